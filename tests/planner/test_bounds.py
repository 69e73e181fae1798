from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora.planner import Load, make_plan
from plora.planner.bounds import largest_budget, lower_bounds
from plora.planner.jobs import Workshop, makespan, place
from plora.planner.preview import _REASONS
from tests.planner.instances import load, problem, problems


@settings(max_examples=40, deadline=None)
@given(problems(8), st.randoms(use_true_random=False))
def test_no_plan_ends_before_the_bound(given_problem, random):
    workshop = Workshop(given_problem)
    drafts, left = [], list(range(len(given_problem.loads)))
    random.shuffle(left)
    while left:
        degree = random.choice([d for d in workshop.degrees if workshop.table(d, left[0])])
        size = random.randint(1, len(left))
        draft = workshop.draft(degree, frozenset(left[:size])) or workshop.draft(degree, frozenset(left[:1]))
        drafts.append(draft)
        left = [k for k in left if k not in draft.members]
    bounds = lower_bounds(given_problem)
    assert makespan(place(drafts, given_problem.n_devices)) >= bounds.best * (1 - 1e-9)


def test_one_trial_on_one_device_meets_the_bound():
    given_problem = problem([load("a", batch=4)])
    workshop = Workshop(given_problem)
    bounds = lower_bounds(given_problem)
    draft = workshop.draft(1, frozenset({0}))
    assert bounds.best == pytest.approx(given_problem.load_seconds + draft.seconds, rel=3e-3)
    assert bounds.best == bounds.longest


def test_places_force_rounds_at_the_floor():
    loads = [load(f"t{i}", 8, batch=1, tokens=32) for i in range(8)]
    free = lower_bounds(problem(loads, gpu="h100"))
    alone = lower_bounds(problem(loads, gpu="h100", max_adapters=1))
    floor = problem(loads, gpu="h100").time.cost(1).floor
    assert alone.memory >= 8 * 1000 * floor
    assert alone.memory > 3 * free.memory


def test_devices_with_a_long_trial_each_have_its_rounds():
    # Of 4000 rounds each, which short trials can share but not spare.
    loads = [load(f"t{i}", 16, batch=1, tokens=400, examples=4000) for i in range(4)]
    given_problem = problem(loads, gpu="h100", count=4, degrees=(1,))
    cost = replace(given_problem.time.cost(1), floor=0.0, per_microbatch=0.02)
    given_problem = replace(given_problem, time=replace(given_problem.time, costs={1: cost}))
    bounds = lower_bounds(given_problem)
    rounds = 4000 * (cost.per_step + cost.per_microbatch)
    made = make_plan(given_problem, time_limit=1)
    assert bounds.work + 0.65 * rounds < bounds.rounds <= made.makespan
    # Twice the devices for the same trials are no reason to have more rounds.
    assert lower_bounds(replace(given_problem, n_devices=8)).rounds < bounds.rounds


def test_every_bound_has_words_for_its_reason():
    bounds = lower_bounds(problem([load("a")]))
    assert _REASONS.keys() == vars(bounds).keys()


def test_whole_trials_cannot_be_divided_at_degree_one():
    loads = [load(f"t{i}", 8, batch=8) for i in range(5)]
    bounds = lower_bounds(problem(loads, count=4, degrees=(1,)))
    given_problem = problem(loads)
    start = given_problem.load_seconds + given_problem.time.cost(1).start
    assert bounds.whole - start == pytest.approx((bounds.work - start) * 4 / 5 * 2)
    assert lower_bounds(problem(loads, count=4, degrees=(1, 2))).whole == 0


def test_the_largest_budget_is_the_last_that_fits():
    given_problem = problem([load("a", 64)])
    tokens = largest_budget(given_problem, 1, 64, "all-linear", 512)
    need = given_problem.memory.adapter_bytes(64)
    assert given_problem.memory.adapter_room(given_problem.free_bytes, tokens, 64) >= need
    assert given_problem.memory.adapter_room(given_problem.free_bytes, tokens + 1, 64) < need


def test_the_bound_knows_the_budget_that_a_very_long_sequence_is_rounded_up_to():
    # A batch that one microbatch of 70,016 tokens holds and one of 70,001 does not.
    made = make_plan(problem([Load("a", 8, 1000, 70_014.0, 70_001)], gpu="h200"), time_limit=1)
    assert made.jobs[0].token_budget == 70_016
    assert made.gap >= -1e-9
