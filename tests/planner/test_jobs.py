from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora.planner.costs import make_costs
from plora.planner.jobs import Workshop, order_rounds, place
from tests.planner.instances import load, problem, problems


@settings(max_examples=40, deadline=None)
@given(problems(10))
def test_every_member_runs_once_within_memory_and_the_seconds_are_right(given_problem):
    workshop = Workshop(given_problem)
    for tables in workshop.tables.values():
        for costs in tables:
            members = [k for k, fits in enumerate(costs.eligible) if fits]
            if not members:
                continue
            draft = order_rounds(costs, members)
            assert sorted(draft.members) == members
            for segment in costs.segments(draft.members, draft.starts):
                assert costs.fits(segment.live)
            assert draft.seconds == pytest.approx(costs.start + costs.seconds(draft.members, draft.starts))


def test_long_trials_at_the_floor_share_their_rounds_with_short_ones():
    # Two trials of batch 1 with few tokens a step would leave the launch floor unused; a cap spreads the short ones.
    long = [load(f"l{i}", 8, batch=1, tokens=32, examples=2000) for i in range(2)]
    short = [load(f"s{i}", 8, batch=4, tokens=100, examples=1000) for i in range(8)]
    costs = make_costs(problem([*long, *short], gpu="h100"), 1, 2048)
    everyone_at_once = costs.start + costs.seconds(range(10))
    draft = order_rounds(costs, range(10))
    assert draft.seconds < 0.93 * everyone_at_once
    assert {draft.members[0], draft.members[1]} == {0, 1}


def test_a_draft_needs_a_table_that_takes_every_member():
    long = load("long", 8, tokens=6000, longest=8000, batch=1)
    large = load("large", 128, longest=128, tokens=100, batch=1)
    workshop = Workshop(problem([long, large], free=int(21.5 * (1 << 30))))
    assert workshop.draft(1, frozenset({0})) is not None
    assert workshop.draft(1, frozenset({1})) is not None
    assert workshop.draft(1, frozenset({0, 1})) is None


@settings(max_examples=40, deadline=None)
@given(problems(6), st.randoms(use_true_random=False))
def test_placed_jobs_never_share_a_device_and_are_aligned(given_problem, random):
    workshop = Workshop(given_problem)
    drafts = []
    for k in range(len(given_problem.loads)):
        degree = random.choice([d for d in workshop.degrees if workshop.table(d, k)])
        drafts.append(workshop.draft(degree, frozenset({k})))
    placed = place(drafts, given_problem.n_devices)
    assert [job.draft for job in placed] == drafts
    for job in placed:
        assert job.first_device % job.draft.degree == 0
        assert job.first_device + job.draft.degree <= given_problem.n_devices
    for i, one in enumerate(placed):
        for other in placed[:i]:
            apart = one.start >= other.end - 1e-9 or other.start >= one.end - 1e-9
            devices = range(one.first_device, one.first_device + one.draft.degree)
            shared = set(devices) & set(range(other.first_device, other.first_device + other.draft.degree))
            assert apart or not shared
