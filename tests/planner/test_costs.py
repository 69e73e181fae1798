from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import fmean, pvariance

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora.data.microbatch import pack
from plora.data.types import Example
from plora.planner import Load
from plora.planner.costs import budget_choices, make_costs, tabulate
from plora.profiler import GPUS, estimate
from tests.planner.instances import GIB, load, problem, problems


@settings(max_examples=25, deadline=None)
@given(problems(6), st.lists(st.integers(0, 60), min_size=6, max_size=6))
def test_segments_add_up_to_the_rounds_one_by_one(given_problem, offsets):
    costs = make_costs(given_problem, 1, 2048)
    members = range(len(costs.steps))
    starts = offsets[: len(costs.steps)]
    last = max(start + costs.steps[k] for k, start in zip(members, starts, strict=True))
    one_by_one = sum(costs.tail)
    for round_ in range(last):
        live = [k for k, start in zip(members, starts, strict=True) if start <= round_ < start + costs.steps[k]]
        one_by_one += costs.round_seconds(live)
    assert costs.seconds(members, starts) == pytest.approx(one_by_one, rel=1e-9)


def test_a_round_is_split_into_microbatches_under_the_budget():
    costs = make_costs(problem([load("a", batch=32, tokens=200)]), 1, 1024)
    step = costs.step
    extra = step.extra_seconds(6400.0 * 16, 6400.0, 0.0, 0.0)
    expected = step.round_of(6400.0, extra, 1, costs.params[0], 7)
    assert costs.round_seconds([0]) == expected


def test_rounds_of_similar_sizes_share_their_cuda_graphs():
    loads = [
        load(name, batch=8, tokens=100, examples=examples) for name, examples in (("a", 80), ("b", 160), ("c", 640))
    ]
    given = problem(loads, gpu="h100")
    plain, few, all_ = (
        make_costs(replace(given, memory=memory, time=estimate(GPUS["h100"], memory)), 1, 8192)
        for memory in (replace(given.memory, graph_tokens=tokens) for tokens in (0, 1000, 4096))
    )
    # 2400 and 1600 tokens, then 800: of two sizes, of which the smaller alone is run as graphs.
    assert few.step.per_graph > 0 == plain.graph_seconds([2400.0, 1600.0, 800.0])
    assert few.graph_seconds([2400.0, 1600.0, 800.0]) == pytest.approx(3 * few.step.per_graph)
    assert all_.graph_seconds([1000.0, 1100.0, 1000.0, 0.0]) == pytest.approx(3 * few.step.per_graph)
    assert all_.graph_seconds([9000.0]) == 0  # in two microbatches above the limit
    rounds = sum((s.last - s.first) * s.round_seconds for s in all_.segments(range(3), [0, 0, 0]))
    graphs = all_.graph_seconds([2400.0, 1600.0, 800.0])
    assert graphs > 3 * few.step.per_graph
    assert all_.seconds(range(3)) == pytest.approx(rounds + sum(all_.tail) + graphs)


def test_work_is_the_price_of_a_load_away_from_the_floor():
    loads = [load(name, batch=32, tokens=1000, examples=320) for name in "ab"]
    given = problem(loads, gpu="h100")
    step = replace(given.time.cost(1), per_tile=0.0)
    costs = make_costs(replace(given, time=replace(given.time, costs={1: step})), 1, 8000)
    together = costs.seconds([0, 1])
    # Microbatches are full, so nothing but the optimizer's constant per round is shared.
    assert together == pytest.approx(sum(costs.work) + 10 * step.per_step, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(problems(6))
def test_a_round_takes_no_less_than_its_loads_by_themselves(given_problem):
    costs = make_costs(given_problem, 1, 2048)
    live: list[int] = []
    for k in range(len(costs.steps)):
        live = [*live, k] if costs.fits([*live, k]) else [k]
        alone = sum(costs.linear[k] / costs.steps[k] + costs.params[k] * costs.step.per_param for k in live)
        assert not costs.fits(live) or costs.round_seconds(live) >= alone * (1 - 1e-9)


def test_budgets_leave_room_for_the_largest_adapter():
    given = problem([load("a", 8), load("b", 128)])
    choices = budget_choices(given, 1)
    need = given.memory.adapter_bytes(128)
    assert choices[0] == 512
    assert choices == sorted(set(choices))
    assert all(given.memory.adapter_room(given.free_bytes, tokens, 128) >= need for tokens in choices)
    assert budget_choices(problem([load("a")], token_budget=700), 1) == [700]
    assert budget_choices(problem([load("a")], free=14 * GIB), 1) == []


def test_a_load_that_no_common_budget_takes_gets_its_own_table():
    # A long sequence beside a small adapter, a large adapter beside short sequences: each fits, not both at once.
    long = load("long", 8, tokens=6000, longest=8000, batch=1)
    large = load("large", 128, longest=128, tokens=100, batch=1)
    given = problem([long, large], free=int(21.5 * GIB))
    assert budget_choices(given, 1) == []
    tables = tabulate(given)[1]
    assert any(costs.eligible[0] for costs in tables)
    assert any(costs.eligible[1] for costs in tables)
    assert not any(all(costs.eligible) for costs in tables)


def test_the_largest_microbatch_allows_for_batches_that_vary():
    loads = [replace(load(name, batch=4, tokens=100), spread=30.0) for name in "ab"]
    costs = make_costs(problem(loads), 1, 2048)
    # 400 tokens each, and three standard deviations of their sum: 42.4.
    assert costs.largest_microbatch([0], [0]) == 490
    assert costs.largest_microbatch([0, 1], [0, 0]) == 928
    assert costs.largest_microbatch([0, 1], [0, costs.steps[0]]) == 490
    # Rounds of 673 to 928 tokens: some just fill a microbatch.
    assert make_costs(problem(loads), 1, 700).largest_microbatch([0, 1], [0, 0]) == 700


@pytest.mark.parametrize(
    ("batch", "budget", "shortest", "longest"), [(40, 4096, 50, 250), (24, 1024, 90, 110), (64, 4096, 60, 80)]
)
def test_the_largest_microbatch_is_that_of_rounds_cut_evenly(batch, budget, shortest, longest):
    random = Random(0)
    lengths = [random.randint(shortest, longest) for _ in range(1000)]
    seen = []
    for _ in range(200):
        drawn = [np.zeros(length, dtype=np.int32) for length in random.choices(lengths, k=batch)]
        packed = pack({0: [Example(tokens, tokens, tokens[:0], "") for tokens in drawn]}, budget)
        seen.append(max(len(each.tokens) for each in packed))
    spread = (batch * pvariance(lengths)) ** 0.5
    whole = Load("a", 8, 100, batch * fmean(lengths), max(lengths), spread=spread)
    likely = make_costs(problem([whole], gpu="h100"), 1, budget).largest_microbatch([0], [0])
    assert max(seen) <= likely <= 1.1 * max(seen)
