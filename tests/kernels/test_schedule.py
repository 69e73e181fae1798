"""The kernels' work lists cover every row and rank once, and give each piece its own workspace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plora.kernels.reference import Tables
from plora.kernels.schedule import RUN_RANKS, TILE_RANKS, WALK_RANKS, DeviceTables, pieces

RANKS = [1, 16, 17, 64, 65, 128, 129, 200, 256, 0, 8]
COUNTS = [5, 64, 0, 1, 300, 63, 65, 128, 700, 0, 2]


def tables(ranks=RANKS, counts=COUNTS, base=130) -> Tables:
    made = Tables.empty(len(ranks))
    made.rows[1:] = torch.tensor([*counts, base]).cumsum(0)
    made.rank[:] = torch.tensor(ranks)
    made.scale[:] = torch.arange(len(ranks)) + 0.5
    made.limit[:] = torch.arange(len(ranks))
    made.key[:] = torch.arange(len(ranks)) * -(2**40) + 7
    return made


def rank_class(ranks: int) -> int:
    return next(c for c in (16, 32, 64, 128) if ranks <= c)


@pytest.mark.parametrize(
    ("rows_each", "ranks_each"), [(64, TILE_RANKS), (256, RUN_RANKS), (1024, RUN_RANKS), (256, WALK_RANKS)]
)
def test_every_row_and_rank_once(rows_each, ranks_each):
    made = tables()
    covered = {slot: np.zeros((int(made.rows[-1]), max(rank, 1)), int) for slot, rank in enumerate(RANKS)}
    for record in pieces(made, rows_each, ranks_each, with_base=False).records:
        slot, row, rows, rank_begin, ranks = record[:5]
        assert 0 < rows <= rows_each
        assert 0 < ranks <= ranks_each
        covered[slot][row : row + rows, rank_begin : rank_begin + ranks] += 1
        assert record[5] == RANKS[slot]
        assert record[7:8].view(np.float32)[0] == slot + 0.5
        assert record[8] == slot
        assert record[9:11].view(np.int64)[0] == made.key[slot]
    for slot, count in enumerate(COUNTS):
        start = int(made.rows[slot])
        assert (covered[slot][start : start + count] == 1).all()
        assert covered[slot].sum() == count * RANKS[slot]


@pytest.mark.parametrize(("rows_each", "ranks_each"), [(64, TILE_RANKS), (256, RUN_RANKS)])
def test_workspaces_are_disjoint(rows_each, ranks_each):
    made = pieces(tables(), rows_each, ranks_each, with_base=True)
    taken = np.zeros(made.blocks, int)
    for record in made.records:
        tiles = -(-record[2] // 64)
        taken[record[6] : record[6] + tiles * rank_class(record[4]) // 16] += 1
    assert (taken == 1).all()


def test_base_rows_are_slot_minus_one():
    made = tables()
    base = [record for record in pieces(made, 64, TILE_RANKS, with_base=True).records if record[0] == -1]
    assert [list(record[1:6]) for record in base] == [[1328, 64, 0, 0, 0], [1392, 64, 0, 0, 0], [1456, 2, 0, 0, 0]]


def test_widest_ranks_start_first():
    ranks = pieces(tables(), 64, TILE_RANKS, with_base=True).records[:, 5]
    assert (np.diff(ranks) <= 0).all()


def test_tables_keep_their_memory_and_clear_old_records():
    device = DeviceTables(torch.device("cpu"))
    device.update(tables())
    before = device.as_list()
    device.update(tables(counts=[3] + [0] * 10, base=0))
    after = device.as_list()
    assert [t.data_ptr() for t in after] == [t.data_ptr() for t in before]
    counts, tiles, runs, *_ = after
    assert counts.tolist() == [8, 8, 8, 1, 1]
    assert tiles[:8, 2].tolist() == runs[:8, 2].tolist() == [3, 0, 0, 0, 0, 0, 0, 0]


def test_no_rows():
    device = DeviceTables(torch.device("cpu"))
    device.update(Tables.empty(4))
    assert device.as_list()[0].tolist() == [0] * 5
