"""Who computes what: the CUDA kernels' work lists, made once per microbatch and shared by all layers.

A *piece* is some rows and some ranks of one adapter. ``down`` and ``up`` take *tiles* of 64 rows and up to
128 ranks. The gradients of factors take *runs* of more rows, so that few blocks add to the same
gradient, and up to 64 ranks; *walks* are shorter runs, for the clusters of sm_90.

A group of ``n`` linears that share an input has lists of its own, over *virtual* ranks: a member's ranks
rounded up to whole chunks of 16, one member's after the other's.

Shapes: ``K`` slots, ``T`` packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from plora.kernels.reference import Tables

# Mirror csrc/args.h and swiglu_args.h; whoever loads the kernels checks that those of MIRRORED agree.
TILE_ROWS, TILE_RANKS, RUN_RANKS, WALK_ROWS, WALK_RANKS = 64, 128, 64, 256, 64
SCRATCH_BLOCK, MAX_SPLITS, MAX_GROUP_SPLITS, MOST_MEMBERS, CLUSTER, PIECE_WORDS = 64 * 16, 16, 8, 3, 8, 16
CHUNK = 16
FUSED_RANKS = 32
MIRRORED = (
    "TILE_ROWS", "TILE_RANKS", "RUN_RANKS", "WALK_ROWS", "WALK_RANKS", "SCRATCH_BLOCK", "MAX_SPLITS",
    "MAX_GROUP_SPLITS", "MOST_MEMBERS", "CLUSTER", "PIECE_WORDS", "FUSED_RANKS",
)  # fmt: skip
# What a column costs beside its ranks, in ranks: how pieces share the device's blocks.
_COLUMN_COST = 48
# Rows of a run. Fewer would make more blocks add to one gradient, more would leave too few blocks.
RUN_ROWS = 512
# Unused records, at the end of a list or of its wide pieces, cost a launched block each, new lengths a CUDA graph.
_COUNT_STEP = 8
# Entries that a list or workspace has at least, used or not: layers would be compiled anew for 0 or 1 of them, as where
# the base alone is evaluated.
_LEAST = 8


@dataclass(frozen=True)
class PieceList:
    """Work records ``int32 [n, PIECE_WORDS]`` and the fp32 workspace that they refer to, in blocks."""

    records: np.ndarray
    blocks: int

    @property
    def most_share(self) -> int:
        """The largest share of the work that a piece has, in 1/65536."""
        return int(self.records[:, 11].max(initial=0))

    @property
    def wide(self) -> int:
        """How many pieces are of adapters of more than ``FUSED_RANKS`` ranks; they come first."""
        return int((self.records[:, 5] > FUSED_RANKS).sum())


def one_piece(tables: Tables) -> np.ndarray:
    """Whether one piece makes all that a microbatch adds to an element of each adapter's gradients, bool ``[K]``.

    Then the kernels can write these gradients, instead of adding to what must be zero first. (``fused_rows`` in
    csrc/swiglu_grad.cuh says what is asked of ranks: it holds the sums of a whole walk where they are few, of half a
    walk where they are more, and none where they are many.)
    """
    ranks, lengths = tables.rank.numpy(), np.diff(tables.rows.numpy())[:-1]
    most = np.where((ranks <= CHUNK) | (ranks > FUSED_RANKS), WALK_ROWS, WALK_ROWS // 2)
    return (lengths > 0) & (lengths <= most)


def pieces(
    tables: Tables,
    rows_each: int,
    ranks_each: int,
    with_base: bool,
    members: int = 1,
    replaced: Collection[int] = (),
) -> PieceList:
    """Cut every adapter's rows and ranks into pieces.

    Args:
        tables: of the microbatch.
        rows_each: most rows of a piece, a multiple of 64.
        ranks_each: most ranks of a piece.
        with_base: whether to cover the rows that see the base alone too, as slot -1.
        members: linears that share the input; of several, ranks are virtual.
        replaced: slots whose gradients are written rather than added to.

    Returns:
        Pieces in the order in which they should start: those of more than ``FUSED_RANKS`` ranks before the
        others, and the heaviest first.
    """
    starts = tables.rows.numpy()
    own_rank = np.append(tables.rank.numpy(), 0)
    rank = own_rank if members == 1 else members * (-(-own_rank // CHUNK) * CHUNK)
    lengths = np.diff(starts)
    if not with_base:
        lengths = np.append(lengths[:-1], 0)
    tiles = -(-lengths // TILE_ROWS)
    row_pieces = -(-lengths // rows_each)
    rank_pieces = np.maximum(-(-rank // ranks_each), 1)
    last_class = _rank_class(rank - (rank_pieces - 1) * ranks_each)

    order = np.argsort(-rank, kind="stable")
    blocks = tiles * ((rank_pieces - 1) * (ranks_each // CHUNK) + last_class // CHUNK)
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
    records[:, 5] = own_rank[slot]
    records[:, 6] = (
        first_block[slot]
        + rank_piece * tiles[slot] * (ranks_each // CHUNK)
        + row_piece * (rows_each // TILE_ROWS) * (classes // CHUNK)
    )
    records[:, 7] = np.append(tables.scale.numpy(), 0).astype(np.float32).view(np.int32)[slot]
    records[:, 8] = np.append(tables.limit.numpy(), 0)[slot]
    # The pieces of the same rows share alike.
    cost = _COLUMN_COST + ((rank_pieces - 1) * ranks_each + last_class) / rank_pieces
    records[:, 11] = cost[slot] / max(cost[slot].sum(), 1) * 65536
    records[:, 9:11] = np.append(tables.key.numpy(), 0).view(np.int32).reshape(-1, 2)[slot]
    records[:, 12] = np.isin(records[:, 0], list(replaced))
    # The longest first, because a launch ends with the last of its blocks.
    weight = cost[slot] * -(-records[:, 2] // TILE_ROWS)
    return PieceList(records[np.lexsort((-weight, rank[slot] <= FUSED_RANKS))], int(blocks.sum()))


def _rank_class(ranks: np.ndarray) -> np.ndarray:
    """The tile's ranks that so many ranks are computed at."""
    return np.select([ranks <= 16, ranks <= 32, ranks <= 64], [16, 32, 64], 128)


class Counts(NamedTuple):
    """What launches depend on beside shapes and addresses.

    Args:
        tiles: records of tiles, for groups of one, two and three linears; unused ones count.
        runs: likewise of runs.
        tile_blocks: workspace of the tiles, likewise, in blocks.
        shares: the largest share of a tile in the work, likewise, in 1/65536.
        walks: records of walks.
        other_blocks: workspace of the runs and walks of one linear, in blocks.
        wide_runs, wide_walks: of one linear, records for pieces of more than ``FUSED_RANKS`` ranks, which come first.
    """

    tiles: tuple[int, ...]
    runs: tuple[int, ...]
    tile_blocks: tuple[int, ...]
    shares: tuple[int, ...]
    walks: int
    other_blocks: int
    wide_runs: int
    wide_walks: int

    @classmethod
    def of(cls, flat: Sequence[int]) -> Counts:
        """From their flat form."""
        tiles, runs, tile_blocks, shares = (
            tuple(flat[first : first + MOST_MEMBERS]) for first in range(0, 4 * MOST_MEMBERS, MOST_MEMBERS)
        )
        return cls(tiles, runs, tile_blocks, shares, *flat[4 * MOST_MEMBERS :])

    def flat(self) -> list[int]:
        """The form in which they cross the operator boundary."""
        return [*self.tiles, *self.runs, *self.tile_blocks, *self.shares, *self[4:]]


NO_COUNTS = Counts.of([0] * (4 * MOST_MEMBERS + 4))


@dataclass(frozen=True)
class Work:
    """``DeviceTables`` as they cross the operator boundary."""

    numbers: torch.Tensor  # int64 on the host, ``Counts``
    tiles: torch.Tensor
    runs: torch.Tensor
    walks: torch.Tensor
    partials: torch.Tensor
    sums: torch.Tensor
    counters: torch.Tensor

    @property
    def counts(self) -> Counts:
        """What its launches depend on."""
        return Counts.of(self.numbers.tolist())

    def tiles_of(self, members: int) -> tuple[int, int, int]:
        """Of a group of so many linears: the first of its tiles, how many, and their workspace in blocks."""
        counts = self.counts
        return sum(counts.tiles[: members - 1]), counts.tiles[members - 1], counts.tile_blocks[members - 1]

    def most_share_of(self, members: int) -> int:
        """Likewise the largest share of a tile in the work, in 1/65536."""
        return self.counts.shares[members - 1]

    def runs_of(self, members: int) -> tuple[int, int]:
        """Likewise the first of its runs and how many."""
        runs = self.counts.runs
        return sum(runs[: members - 1]), runs[members - 1]


class DeviceTables:
    """The work lists and the workspace on the device.

    They keep their place in memory and are overwritten by ``update``, unless a microbatch needs more
    room than any before. The lists of tiles for groups of one, two and three linears lie one after the
    other, so do those of runs.

    Args:
        device: where the kernels run.
    """

    def __init__(self, device: torch.device) -> None:
        self._counts = NO_COUNTS
        self._numbers = torch.tensor(self._counts.flat())
        self._tiles, self._runs, self._walks = (
            torch.zeros(_LEAST, PIECE_WORDS, dtype=torch.int32, device=device) for _ in range(3)
        )
        self._partials, self._sums = (torch.zeros(_LEAST, device=device) for _ in range(2))
        self._counters = torch.zeros(_LEAST, dtype=torch.int32, device=device)

    def update(self, tables: Tables, at_least: Counts | None = None, replaced: Collection[int] = ()) -> None:
        """Make the lists for ``tables``; small copies that do not wait for the device.

        Args:
            tables: of the microbatch.
            at_least: counts that the lists are filled up to with unused records. Launches depend on the counts alone,
                so what was captured with some serves all that need no more. What needs more gets room to spare.
                Default: as few records as will do.
            replaced: slots whose gradients are written rather than added to; of `one_piece` each.
        """
        # One block for all rows of an adapter adds in a fixed order.
        deterministic = torch.are_deterministic_algorithms_enabled()
        rows = -(-max(int(tables.rows[-1]), 1) // TILE_ROWS) * TILE_ROWS if deterministic else RUN_ROWS
        groups = range(1, MOST_MEMBERS + 1)
        tiles = [pieces(tables, TILE_ROWS, TILE_RANKS, with_base=True, members=n) for n in groups]
        runs = [pieces(tables, rows, RUN_RANKS, with_base=False, members=n, replaced=replaced) for n in groups]
        walks = pieces(tables, WALK_ROWS, WALK_RANKS, with_base=False, replaced=replaced)
        self._counts = counts = _counts(tiles, runs, walks, at_least)
        self._numbers.copy_(torch.tensor(counts.flat()))
        self._tiles = _written(self._tiles, tiles, counts.tiles)
        self._runs = _written(self._runs, runs, counts.runs, counts.wide_runs)
        self._walks = _written(self._walks, [walks], [counts.walks], counts.wide_walks)
        alone, *grouped = counts.tile_blocks
        partials = max(alone * MAX_SPLITS, max(grouped) * MAX_GROUP_SPLITS)
        self._partials = _at_least(self._partials, partials * SCRATCH_BLOCK)
        # A launch of grad_hidden makes dh of all linears of a group.
        self._sums = _at_least(self._sums, MOST_MEMBERS * counts.other_blocks * SCRATCH_BLOCK)
        passes = max(counts.runs[0], CLUSTER * counts.walks)
        self._counters = _at_least(self._counters, max(*counts.tiles, MOST_MEMBERS * passes))

    def release_workspace(self) -> None:
        """Give back what the largest microbatch so far has made the workspace grow to."""
        self._partials, self._sums, self._counters = (
            tensor.new_zeros(_LEAST) for tensor in (self._partials, self._sums, self._counters)
        )

    @property
    def counts(self) -> Counts:
        """Of the lists as they are."""
        return self._counts

    def as_list(self) -> list[torch.Tensor]:
        """The form in which they cross the operator boundary: ``Work(*tables.as_list())``."""
        lists = [self._numbers, self._tiles, self._runs, self._walks]
        return [*lists, self._partials, self._sums, self._counters]


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``, without making the host wait for what the device is doing."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # torch's pinned memory is not reused before the copies from it have run.
    return tensor.pin_memory().to(device, non_blocking=True)


def _counts(tiles: Sequence[PieceList], runs: Sequence[PieceList], walks: PieceList, at_least: Counts | None) -> Counts:
    """Counts of the lists, no less than ``at_least``; see ``DeviceTables.update``."""
    if at_least is None:
        return _needed(tiles, runs, walks, _rounded, coarse)
    needed, counts = _needed(tiles, runs, walks, int, int), at_least
    if not _serves(at_least, needed):
        # Similar ones come with more: what was captured with just enough would soon be captured again.
        roomy = _needed(tiles, runs, walks, _with_room, _with_room)
        most = Counts.of([max(pair) for pair in zip(roomy.flat(), at_least.flat(), strict=True)])
        narrow_runs, narrow_walks = (max(pair) for pair in zip(_narrow(roomy), _narrow(at_least), strict=True))
        counts = most._replace(
            runs=(most.wide_runs + narrow_runs, *most.runs[1:]), walks=most.wide_walks + narrow_walks
        )
    # The shares bound how many blocks a launch has; a piece that asks for more makes do with those.
    shares = zip(at_least.shares, needed.shares, strict=True)
    return counts._replace(shares=tuple(known if 2 * known >= own else own for known, own in shares))


def _needed(
    tiles: Sequence[PieceList],
    runs: Sequence[PieceList],
    walks: PieceList,
    room: Callable[[int], int],
    blocks: Callable[[int], int],
) -> Counts:
    """What the lists need: counts of records rounded up by ``room``, of workspace by ``blocks``."""
    wide_runs, wide_walks = room(runs[0].wide), room(walks.wide)
    return Counts(
        tiles=tuple(room(len(each.records)) for each in tiles),
        runs=(
            wide_runs + room(len(runs[0].records) - runs[0].wide),
            *(room(len(each.records)) for each in runs[1:]),
        ),
        tile_blocks=tuple(blocks(each.blocks) for each in tiles),
        shares=tuple(coarse(each.most_share) for each in tiles),
        walks=wide_walks + room(len(walks.records) - walks.wide),
        other_blocks=blocks(max(runs[0].blocks, walks.blocks)),
        wide_runs=wide_runs,
        wide_walks=wide_walks,
    )


def _serves(counts: Counts, needed: Counts) -> bool:
    """Whether lists of these counts have room for what is needed, whatever the shares."""
    pairs = zip(counts._replace(shares=()).flat(), needed._replace(shares=()).flat(), strict=True)
    return all(has >= needs for has, needs in (*pairs, *zip(_narrow(counts), _narrow(needed), strict=True)))


def _narrow(counts: Counts) -> tuple[int, int]:
    """Records of runs and of walks, of one linear, behind those for wide pieces."""
    return counts.runs[0] - counts.wide_runs, counts.walks - counts.wide_walks


def _rounded(count: int) -> int:
    return -(-count // _COUNT_STEP) * _COUNT_STEP


def _with_room(count: int) -> int:
    return _rounded(coarse(count + count // 4))


def coarse(number: int, steps: int = 8) -> int:
    """``number`` rounded up to one of ``steps`` values an octave, a power of two: similar numbers become equal."""
    step = 1 << max(0, number.bit_length() - steps.bit_length())
    return -(-number // step) * step


def _written(table: torch.Tensor, lists: Sequence[PieceList], counts: Sequence[int], wide: int = 0) -> torch.Tensor:
    """The lists one after the other in ``table``'s memory or a larger one, each filled up with unused records.

    ``counts``: records of each list. ``wide``: of the first one, where the pieces begin that are not wide.
    """
    total = sum(counts)
    if total > len(table):
        table = table.new_zeros(2 * total, PIECE_WORDS)
    padded = torch.zeros(total, PIECE_WORDS, dtype=torch.int32, pin_memory=table.is_cuda)
    start = 0
    for each, count in zip(lists, counts, strict=True):
        records = torch.from_numpy(each.records)
        first = each.wide if wide and start == 0 else 0
        padded[start : start + first] = records[:first]
        begin = start + wide if start == 0 else start
        padded[begin : begin + len(records) - first] = records[first:]
        start += count
    table[:total].copy_(padded, non_blocking=True)
    return table


def _at_least(workspace: torch.Tensor, numel: int) -> torch.Tensor:
    """A workspace of zeros, which the kernels leave zero where they rely on it."""
    return workspace if len(workspace) >= numel else workspace.new_zeros(numel + numel // 4)
