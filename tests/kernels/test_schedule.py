"""The kernels' work lists cover every row and rank once, and give each piece its own workspace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plora.kernels.reference import Tables
from plora.kernels.schedule import (
    CLUSTER,
    FUSED_RANKS,
    MAX_GROUP_SPLITS,
    MAX_SPLITS,
    NO_COUNTS,
    RUN_RANKS,
    RUN_ROWS,
    SCRATCH_BLOCK,
    TILE_RANKS,
    TILE_ROWS,
    WALK_RANKS,
    WALK_ROWS,
    Counts,
    DeviceTables,
    Work,
    one_piece,
    pieces,
)

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


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows_each", "ranks_each"), [(64, TILE_RANKS), (256, RUN_RANKS), (1024, RUN_RANKS), (256, WALK_RANKS)]
)
def test_every_row_and_rank_once(rows_each, ranks_each, members):
    made = tables()
    virtual = [rank if members == 1 else members * -(-rank // 16) * 16 for rank in RANKS]
    covered = {slot: np.zeros((int(made.rows[-1]), max(rank, 1)), int) for slot, rank in enumerate(virtual)}
    for record in pieces(made, rows_each, ranks_each, with_base=False, members=members).records:
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
        assert covered[slot].sum() == count * virtual[slot]


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(("rows_each", "ranks_each"), [(64, TILE_RANKS), (256, RUN_RANKS)])
def test_workspaces_are_disjoint(rows_each, ranks_each, members):
    made = pieces(tables(), rows_each, ranks_each, with_base=True, members=members)
    taken = np.zeros(made.blocks, int)
    for record in made.records:
        tiles = -(-record[2] // 64)
        taken[record[6] : record[6] + tiles * rank_class(record[4]) // 16] += 1
    assert (taken == 1).all()


def test_base_rows_are_slot_minus_one():
    made = tables()
    base = [record for record in pieces(made, 64, TILE_RANKS, with_base=True).records if record[0] == -1]
    assert [list(record[1:6]) for record in base] == [[1328, 64, 0, 0, 0], [1392, 64, 0, 0, 0], [1456, 2, 0, 0, 0]]


@pytest.mark.parametrize("rows_each", [64, 256, 512])
def test_wide_ranks_then_the_heaviest_start_first(rows_each):
    records = pieces(tables(), rows_each, RUN_RANKS, with_base=True).records
    wide = records[:, 5] > FUSED_RANKS
    assert (np.diff(wide.astype(int)) <= 0).all()
    for part in (records[wide], records[~wide]):
        assert (np.diff(part[:, 11] * -(-part[:, 2] // 64)) <= 0).all()


@pytest.mark.parametrize("members", [1, 3])
def test_shares_are_of_all_work(members):
    records = pieces(tables(), 64, TILE_RANKS, with_base=True, members=members).records
    shares = records[:, 11]
    assert 65536 - len(shares) <= shares.sum() <= 65536
    for slot in set(records[:, 0].tolist()):
        assert len(set(shares[records[:, 0] == slot].tolist())) == 1
    by_rank = dict(zip(records[:, 5].tolist(), shares.tolist(), strict=True))
    assert by_rank[1] <= by_rank[16] < by_rank[64] < by_rank[128]
    assert members > 1 or by_rank[128] > 2 * by_rank[1]


def test_tables_keep_their_memory_and_clear_old_records():
    device = DeviceTables(torch.device("cpu"))
    device.update(tables())
    before = device.as_list()
    device.update(tables(counts=[3] + [0] * 10, base=0))
    after = device.as_list()
    assert [t.data_ptr() for t in after] == [t.data_ptr() for t in before]
    work = Work(*after)
    assert work.counts == Counts((8, 8, 8), (8, 8, 8), (1, 2, 4), (65536,) * 3, 8, 1, 0, 0)
    for table in (work.tiles, work.runs):
        assert table[:24, 2].tolist() == [3, 0, 0, 0, 0, 0, 0, 0] * 3


@pytest.mark.parametrize("members", [1, 2, 3])
def test_lists_of_a_group_are_found_in_the_tables(members):
    made, device = tables(), DeviceTables(torch.device("cpu"))
    device.update(made)
    work = Work(*device.as_list())
    first, count, blocks = work.tiles_of(members)
    expected = pieces(made, TILE_ROWS, TILE_RANKS, with_base=True, members=members)
    length = len(expected.records)
    assert length <= count < length + 8
    assert np.array_equal(work.tiles[first : first + length].numpy(), expected.records)
    assert not work.tiles[first + length : first + count].any()
    assert expected.blocks <= blocks <= 1.125 * expected.blocks
    assert 1 <= work.most_share_of(members) / expected.records[:, 11].max() <= 1.125
    splits = MAX_SPLITS if members == 1 else MAX_GROUP_SPLITS
    assert len(work.partials) >= blocks * splits * SCRATCH_BLOCK
    assert len(work.counters) >= count
    # A launch of grad_hidden makes those of all linears of a group, each with sums and counters of its own.
    counts = work.counts
    assert len(work.sums) >= members * counts.other_blocks * SCRATCH_BLOCK
    assert len(work.counters) >= members * max(counts.runs[0], CLUSTER * counts.walks)
    first, count = work.runs_of(members)
    expected = pieces(made, RUN_ROWS, RUN_RANKS, with_base=False, members=members)
    found = work.runs[first : first + count].numpy()
    assert len(expected.records) <= count < len(expected.records) + 16
    assert np.array_equal(found[found[:, 2] > 0], expected.records)
    assert not found[found[:, 2] == 0].any()


def test_adapters_too_wide_to_fuse_come_first():
    made, device = tables(), DeviceTables(torch.device("cpu"))
    device.update(made)
    work = Work(*device.as_list())
    counts = work.counts
    for table, count, first in (
        (work.runs, counts.runs[0], counts.wide_runs),
        (work.walks, counts.walks, counts.wide_walks),
    ):
        ranks = table[:count, 5]
        used = ranks[:first] > 0
        assert (ranks[:first][used] > FUSED_RANKS).all()
        assert (ranks[first:] <= FUSED_RANKS).all()
        assert 0 < used.sum() < used.sum() + (ranks[first:] > 0).sum() < len(ranks)


def test_counts_of_another_microbatch_are_kept_where_it_needs_no_more():
    large, small = tables(), tables(counts=[n // 2 for n in COUNTS], base=600)
    device, plain = DeviceTables(torch.device("cpu")), DeviceTables(torch.device("cpu"))
    device.update(large)
    counts = device.counts
    device.update(small, counts)
    plain.update(small)
    assert device.counts == counts
    for members in (1, 2, 3):
        for which in ("tiles", "runs"):
            found = [used(Work(*each.as_list()), which, members) for each in (device, plain)]
            assert torch.equal(*found)
    device.update(large, plain.counts)
    assert all(mine >= theirs for mine, theirs in zip(device.counts.flat(), plain.counts.flat(), strict=True))
    assert device.counts != plain.counts


def test_counts_of_one_ragged_microbatch_serve_those_like_it():
    generator, device, changes = np.random.default_rng(0), DeviceTables(torch.device("cpu")), 0
    counts = NO_COUNTS
    for _ in range(60):
        ragged = [int(n) * int(n > 0) for n in generator.normal(400, 120, len(COUNTS))]
        device.update(tables(counts=ragged, base=100), counts)
        changes += device.counts != counts
        counts = device.counts
    assert changes <= 3


def used(work, which, members):
    """The pieces of a list that have rows."""
    first, count, *_ = getattr(work, f"{which}_of")(members)
    records = getattr(work, which)[first : first + count]
    return records[records[:, 2] > 0]


def test_one_piece_is_all_there_is_in_every_list():
    ranks = [1, 16, 16, 17, 17, 32, 33, 33, 256, 8]
    counts = [WALK_ROWS, WALK_ROWS, WALK_ROWS + 1, 128, 129, 1, WALK_ROWS, WALK_ROWS + 1, WALK_ROWS, 0]
    made = tables(ranks, counts)
    assert one_piece(made).tolist() == [True, True, False, True, False, True, True, False, True, False]
    for rows_each, ranks_each in ((RUN_ROWS, RUN_RANKS), (WALK_ROWS, WALK_RANKS)):
        records = pieces(made, rows_each, ranks_each, with_base=False, members=2).records
        for slot in one_piece(made).nonzero()[0]:
            first_ranks = records[records[:, 0] == slot, 3]
            assert len(first_ranks) == len(set(first_ranks))


def test_only_pieces_of_replaced_slots_replace():
    device = DeviceTables(torch.device("cpu"))
    device.update(tables(), replaced=[0, 5])
    work = Work(*device.as_list())
    for table in (work.runs, work.walks):
        used = table[table[:, 2] > 0]
        assert torch.equal(used[:, 12] > 0, torch.isin(used[:, 0], torch.tensor([0, 5])))
    assert not work.tiles[:, 12].any()
    device.update(tables())
    assert not work.runs[:, 12].any()


def test_no_rows():
    device = DeviceTables(torch.device("cpu"))
    device.update(Tables.empty(4))
    assert not device.as_list()[0].any()


def test_no_size_is_one_that_layers_are_compiled_for():
    device = DeviceTables(torch.device("cpu"))
    for counts in ([0] * len(COUNTS), COUNTS):
        device.update(tables(counts=counts))
        assert all(len(each) > 1 for each in device.as_list())
        device.release_workspace()
        assert all(len(each) > 1 for each in device.as_list())
