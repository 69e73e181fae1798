"""Who computes what: the CUDA kernels' work lists, made once per microbatch and shared by all layers.

A *piece* is some rows and some ranks of one adapter. ``down`` and ``up`` take *tiles* of 64 rows and up to
128 ranks. The gradients of factors take *runs* of more rows, so that few blocks add to the same
gradient, and up to 64 ranks; *walks* are shorter runs, for the clusters of sm_90.

Shapes: ``K`` slots, ``T`` packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from plora.kernels.reference import Tables

# Mirror csrc/args.h; plora.kernels.cuda checks that they agree.
TILE_ROWS, TILE_RANKS, RUN_RANKS, WALK_ROWS, WALK_RANKS = 64, 128, 64, 256, 64
SCRATCH_BLOCK, MAX_SPLITS, CLUSTER, PIECE_WORDS = 64 * 16, 16, 8, 16
# Rows of a run. Fewer would make more blocks add to one gradient, more would leave too few blocks.
RUN_ROWS = 512
# Unused records at the end of a list cost a launched block each, new lengths of it a CUDA graph.
_COUNT_STEP = 8


@dataclass(frozen=True)
class PieceList:
    """Work records ``int32 [n, PIECE_WORDS]`` and the fp32 workspace that they refer to, in blocks."""

    records: np.ndarray
    blocks: int


def pieces(tables: Tables, rows_each: int, ranks_each: int, with_base: bool) -> PieceList:
    """Cut every adapter's rows and ranks into pieces.

    Args:
        tables: of the microbatch.
        rows_each: most rows of a piece, a multiple of 64.
        ranks_each: most ranks of a piece.
        with_base: whether to cover the rows that see the base alone too, as slot -1.

    Returns:
        Pieces in the order in which they should start: the widest ranks first, because a launch
        ends with the last of its blocks.
    """
    starts = tables.rows.numpy()
    rank = np.append(tables.rank.numpy(), 0)
    lengths = np.diff(starts)
    if not with_base:
        lengths = np.append(lengths[:-1], 0)
    tiles = -(-lengths // TILE_ROWS)
    row_pieces = -(-lengths // rows_each)
    rank_pieces = np.maximum(-(-rank // ranks_each), 1)
    last_class = _rank_class(rank - (rank_pieces - 1) * ranks_each)

    order = np.argsort(-rank, kind="stable")
    blocks = tiles * ((rank_pieces - 1) * (ranks_each // 16) + last_class // 16)
    first_block = np.zeros_like(blocks)
    first_block[order] = np.cumsum(blocks[order]) - blocks[order]

    counts = (row_pieces * rank_pieces)[order]
    slot = np.repeat(order, counts)
    index = np.arange(len(slot)) - np.repeat(np.cumsum(counts) - counts, counts)
    # The rank pieces of the same rows are neighbours: the second finds the rows in the L2 cache.
    row_piece, rank_piece = np.divmod(index, rank_pieces[slot])
    classes = np.where(rank_piece == rank_pieces[slot] - 1, last_class[slot], ranks_each)

    records = np.zeros((len(slot), PIECE_WORDS), np.int32)
    base = slot == len(rank) - 1
    records[:, 0] = np.where(base, -1, slot)
    records[:, 1] = starts[slot] + row_piece * rows_each
    records[:, 2] = np.minimum(lengths[slot] - row_piece * rows_each, rows_each)
    records[:, 3] = rank_piece * ranks_each
    records[:, 4] = np.minimum(rank[slot] - records[:, 3], ranks_each)
    records[:, 5] = rank[slot]
    records[:, 6] = (
        first_block[slot]
        + rank_piece * tiles[slot] * (ranks_each // 16)
        + row_piece * (rows_each // TILE_ROWS) * (classes // 16)
    )
    records[:, 7] = np.append(tables.scale.numpy(), 0).astype(np.float32).view(np.int32)[slot]
    records[:, 8] = np.append(tables.limit.numpy(), 0)[slot]
    records[:, 9:11] = np.append(tables.key.numpy(), 0).view(np.int32).reshape(-1, 2)[slot]
    return PieceList(records, int(blocks.sum()))


def _rank_class(ranks: np.ndarray) -> np.ndarray:
    """The tile's ranks that so many ranks are computed at."""
    return np.select([ranks <= 16, ranks <= 32, ranks <= 64], [16, 32, 64], 128)


class DeviceTables:
    """The work lists and the workspace on the device.

    They keep their place in memory and are overwritten by ``update``, unless a microbatch needs more
    room than any before.

    Args:
        device: where the kernels run.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts = torch.zeros(5, dtype=torch.int64)
        self._tiles = self._records(0, device)
        self._runs = self._records(0, device)
        self._walks = self._records(0, device)
        self._partials = torch.zeros(0, device=device)
        self._sums = torch.zeros(0, device=device)
        self._counters = torch.zeros(0, dtype=torch.int32, device=device)

    def update(self, tables: Tables) -> None:
        """Make the lists for ``tables``; small copies that do not wait for the device."""
        tiles = pieces(tables, TILE_ROWS, TILE_RANKS, with_base=True)
        # One block for all rows of an adapter adds in a fixed order.
        deterministic = torch.are_deterministic_algorithms_enabled()
        rows = max(int(tables.rows[-1]), 1) if deterministic else RUN_ROWS
        runs = pieces(tables, -(-rows // TILE_ROWS) * TILE_ROWS, RUN_RANKS, with_base=False)
        walks = pieces(tables, WALK_ROWS, WALK_RANKS, with_base=False)
        self._tiles = _written(self._tiles, tiles.records)
        self._runs = _written(self._runs, runs.records)
        self._walks = _written(self._walks, walks.records)
        lengths = [_rounded(len(each.records)) for each in (tiles, runs, walks)]
        run_blocks = max(runs.blocks, walks.blocks)
        self._counts.copy_(torch.tensor([*lengths, tiles.blocks, run_blocks]))
        self._partials = _at_least(self._partials, tiles.blocks * SCRATCH_BLOCK * MAX_SPLITS)
        self._sums = _at_least(self._sums, run_blocks * SCRATCH_BLOCK)
        self._counters = _at_least(self._counters, max(len(self._tiles), len(self._runs), CLUSTER * len(self._walks)))

    def as_list(self) -> list[torch.Tensor]:
        """The form in which they cross the operator boundary; ``plora.kernels.cuda`` reads it."""
        lists = [self._counts, self._tiles, self._runs, self._walks]
        return [*lists, self._partials, self._sums, self._counters]

    @staticmethod
    def _records(n: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(n, PIECE_WORDS, dtype=torch.int32, device=device)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``, without making the host wait for what the device is doing."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # torch's pinned memory is not reused before the copies from it have run.
    return tensor.pin_memory().to(device, non_blocking=True)


def _rounded(count: int) -> int:
    return -(-count // _COUNT_STEP) * _COUNT_STEP


def _written(table: torch.Tensor, records: np.ndarray) -> torch.Tensor:
    """``records``, then unused records, in ``table``'s memory or a larger one."""
    count = _rounded(len(records))
    if count > len(table):
        table = table.new_zeros(2 * count, PIECE_WORDS)
    padded = torch.zeros(count, PIECE_WORDS, dtype=torch.int32, pin_memory=table.is_cuda)
    padded[: len(records)] = torch.from_numpy(records)
    table[:count].copy_(padded, non_blocking=True)
    return table


def _at_least(workspace: torch.Tensor, numel: int) -> torch.Tensor:
    """A workspace of zeros, which the kernels leave zero where they rely on it."""
    return workspace if len(workspace) >= numel else workspace.new_zeros(numel + numel // 4)
