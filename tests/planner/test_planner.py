from __future__ import annotations

import itertools
import time as clock
from dataclasses import replace

import pytest
from hypothesis import given, settings

from plora.models.spec import ModelSpec
from plora.planner import Load, Plan, Problem, make_plan, plan_on
from plora.planner.bounds import lower_bounds
from plora.planner.costs import Costs
from plora.planner.greedy import greedy
from plora.planner.jobs import Draft, Workshop, makespan, place
from plora.planner.sweep import _contenders
from plora.profiler import GPUS, MemoryModel, estimate
from tests.planner.instances import GIB, SMALL, assert_sound, grid, load, model, problem, problems


@settings(max_examples=12, deadline=None)
@given(problems(10))
def test_plans_are_sound_and_never_worse_than_greedy(given_problem):
    plan = make_plan(given_problem, time_limit=1)
    assert_sound(plan, given_problem)
    assert plan.makespan >= plan.lower_bound * (1 - 1e-9)
    workshop = Workshop(given_problem)
    assert plan.makespan <= makespan(place(greedy(workshop), given_problem.n_devices)) * (1 + 1e-9)


@settings(max_examples=8, deadline=None)
@given(problems(8))
def test_the_same_seed_gives_the_same_plan(given_problem):
    first, second = (make_plan(given_problem, time_limit=60, seed=3) for _ in range(2))
    assert first.to_json() == second.to_json()


@settings(max_examples=12, deadline=None)
@given(problems(8))
def test_more_memory_or_devices_never_make_an_incumbent_worse(given_problem):
    plan = make_plan(given_problem, time_limit=0.5)
    roomier = replace(given_problem, free_bytes=given_problem.free_bytes + 4 * GIB)
    more = replace(given_problem, n_devices=given_problem.n_devices * 2)
    for richer in (roomier, more):
        better = make_plan(richer, time_limit=0.2, incumbent=plan)
        assert_sound(better, richer)
        assert better.makespan <= plan.makespan * (1 + 1e-9)


def test_an_incumbent_better_than_what_is_found_is_kept():
    # Five alike on four devices: the greedy answer cuts them evenly, the best one ends with several devices together.
    loads = [load(f"t{i}", 8, 32, tokens=1000, examples=3000) for i in range(5)]
    given_problem = problem(loads, gpu="h100", count=4)
    searched = make_plan(given_problem, time_limit=10)
    hurried = make_plan(given_problem, time_limit=0)
    assert searched.makespan < 0.99 * hurried.makespan
    again = make_plan(given_problem, time_limit=0, incumbent=searched)
    assert again.makespan == pytest.approx(searched.makespan)
    assert again.jobs == searched.jobs


@pytest.mark.parametrize("objective", ["makespan", "rank_throughput"])
def test_each_objective_gives_a_sound_plan(objective):
    given_problem = problem(grid(20), count=4, objective=objective)
    plan = make_plan(given_problem, time_limit=5)
    assert_sound(plan, given_problem)
    if objective == "rank_throughput":
        assert plan.method in ("plora", "greedy")
        assert "plora" in plan.candidates


def _set_partitions(items: list[int]):
    if not items:
        yield []
        return
    head, *tail = items
    for rest in _set_partitions(tail):
        yield [[head], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [head, *rest[i]], *rest[i + 1 :]]


def _best_rounds(costs: Costs, members: tuple[int, ...]) -> Draft | None:
    """The best of all orders and all starts at zero or at another member's end."""
    best: Draft | None = None
    for order in itertools.permutations(members):
        partial: list[list[int]] = [[]]
        for i, _ in enumerate(order):
            grown = []
            for starts in partial:
                ends = {start + costs.steps[k] for start, k in zip(starts, order, strict=False)}
                for start in {0, *ends}:
                    candidate = [*starts, start]
                    if all(costs.fits(s.live) for s in costs.segments(order[: i + 1], candidate)):
                        grown.append(candidate)
            partial = grown
        for starts in partial:
            seconds = costs.start + costs.seconds(order, starts)
            if best is None or seconds < best.seconds:
                best = Draft(costs, order, tuple(starts), seconds)
    return best


def _optimum(given_problem: Problem) -> float:
    """Exhaustive: every partition into jobs, degree of each, rounds within each and order of starting."""
    workshop = Workshop(given_problem)
    drafts: dict[tuple[int, tuple[int, ...]], Draft | None] = {}

    def draft(degree: int, members: tuple[int, ...]) -> Draft | None:
        if (degree, members) not in drafts:
            options = [
                made
                for costs in workshop.tables.get(degree, ())
                if all(costs.eligible[k] for k in members) and (made := _best_rounds(costs, members))
            ]
            drafts[degree, members] = min(options, key=lambda made: made.seconds, default=None)
        return drafts[degree, members]

    best = float("inf")
    for packs in _set_partitions(list(range(len(given_problem.loads)))):
        for degrees in itertools.product(workshop.degrees, repeat=len(packs)):
            jobs = [draft(degree, tuple(sorted(pack))) for degree, pack in zip(degrees, packs, strict=True)]
            if any(job is None for job in jobs):
                continue
            for order in itertools.permutations(jobs):
                best = min(best, makespan(place(order, given_problem.n_devices)))
    return best


SMALL_INSTANCES = [
    # count, gpu, [(rank, batch, tokens, examples)]
    (1, "a10", [(128, 4, 200, 400), (128, 32, 200, 400), (64, 1, 32, 300), (8, 8, 1000, 200)]),
    (2, "a10", [(128, 8, 200, 500), (16, 8, 200, 500), (64, 8, 200, 500)]),
    (2, "h100", [(8, 1, 32, 3000), (8, 4, 32, 3000), (16, 32, 1000, 600), (32, 32, 1000, 600)]),
    (4, "h100", [(8, 1, 32, 2000), (16, 2, 200, 2000), (64, 8, 1000, 900), (128, 32, 1000, 900)]),
    (4, "a10", [(8, 32, 1000, 3000), (8, 32, 1000, 3000), (8, 32, 1000, 3000), (8, 32, 1000, 3000)]),
    (2, "h100", [(8, 32, 1000, 9000), (8, 32, 1000, 9000), (8, 32, 1000, 9000)]),
]


@pytest.mark.parametrize("number", range(len(SMALL_INSTANCES)))
def test_small_instances_are_within_five_percent_of_the_optimum(number):
    count, gpu, kinds = SMALL_INSTANCES[number]
    loads = [load(f"t{i}", r, b, tokens=t, examples=n) for i, (r, b, t, n) in enumerate(kinds)]
    given_problem = problem(loads, count=count, gpu=gpu)
    plan = make_plan(given_problem, gap=0.0, time_limit=10)
    best = _optimum(given_problem)
    assert plan.lower_bound <= best * (1 + 1e-9)
    assert plan.makespan <= best * 1.05


def test_the_paper_sized_instance_meets_its_goals():
    given_problem = problem(grid(120), gpu="a10", count=8)
    began = clock.perf_counter()
    plan = make_plan(given_problem)
    assert clock.perf_counter() - began < 20
    assert_sound(plan, given_problem)
    assert plan.gap <= 0.05


def test_without_a_solver_or_time_there_is_still_a_plan(monkeypatch):
    monkeypatch.setattr("pulp.listSolvers", lambda onlyAvailable: [])  # noqa: N803
    given_problem = problem(grid(20), count=4)
    for limit in (5.0, 0.0):
        assert_sound(make_plan(given_problem, time_limit=limit), given_problem)
    with pytest.raises(ValueError, match="solver cbc is not installed; installed: none"):
        make_plan(given_problem, solver="cbc")


def test_a_failing_solver_leaves_the_greedy_packs(monkeypatch):
    import pulp

    def fail(*_args, **_options):
        raise pulp.PulpSolverError("out of licences")

    monkeypatch.setattr(pulp.LpProblem, "solve", fail)
    given_problem = problem(grid(20), count=4, objective="rank_throughput")
    assert_sound(make_plan(given_problem), given_problem)


def test_planning_for_absent_devices_chooses_checkpointing_and_carries_baselines():
    memories = [model(checkpointing=False), model(checkpointing=True)]
    chosen, plan = plan_on(grid(16), memories, GPUS["a10"], 4, time_limit=2)
    assert_sound(plan, chosen)
    assert plan.estimated
    assert plan.device == "a10"
    assert set(plan.baselines) == {"min_gpu", "max_gpu", "sequential_packed", "best_one_at_a_time"}
    for memory in memories:
        other = Problem(
            tuple(grid(16)), memory, estimate(GPUS["a10"], memory, (1, 2, 4)), GPUS["a10"].free_bytes, 4, (1, 2, 4)
        )
        assert plan.makespan <= make_plan(other, time_limit=2).makespan * 1.01


def test_planning_for_absent_devices_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"hardware\.count must be at least 1, got 0"):
        plan_on(grid(2), [model()], GPUS["a10"], 0)
    with pytest.raises(ValueError, match="does not fit even alone"):
        plan_on(grid(2), [model()], GPUS["a10"], 1, free_bytes=8 * GIB)
    with pytest.raises(ValueError, match="degree 3"):
        plan_on(grid(2), [model()], GPUS["a10"], 4, degrees=(3,))


def test_an_incumbent_of_other_trials_is_refused():
    plan = make_plan(problem(grid(4)), time_limit=1)
    with pytest.raises(ValueError, match="trial t003 in job"):
        make_plan(problem(grid(3)), incumbent=plan)


def test_trials_that_exclude_each_other_go_to_jobs_of_their_own():
    loads: list[Load] = [
        load("long", 8, tokens=6000, longest=8000, batch=1),
        load("large", 128, longest=128, tokens=100, batch=1),
        load("small", 8, longest=128),
    ]
    given_problem = problem(loads, free=int(21.5 * GIB), count=1)
    plan: Plan = make_plan(given_problem, time_limit=2)
    assert_sound(plan, given_problem)
    assert len(plan.jobs) == 2
    assert plan.free_bytes < SMALL


def test_of_several_memory_models_the_likely_winner_is_planned_first():
    loads = [load(f"t{i}", 16, batch=1 + i % 4, tokens=60) for i in range(12)]
    plain, graphs, recomputed = (
        MemoryModel(
            ModelSpec.preset("Qwen/Qwen2.5-7B"),
            "bf16",
            activation_checkpointing=checkpointing,
            compiled=True,
            graph_tokens=tokens,
        )
        for checkpointing, tokens in ((False, 0), (False, 2048), (True, 2048))
    )
    problems = [problem(loads, gpu="h100", count=2, degrees=(1,), memory=each) for each in (plain, recomputed, graphs)]
    bounds = [lower_bounds(each) for each in problems]
    ends = [makespan(place(greedy(Workshop(each)), 2)) for each in problems]
    assert ends[2] < ends[1] < ends[0]
    # Without graphs not even the bound is below what the others end at.
    assert _contenders(problems, bounds) == [i for i in (2, 1) if bounds[i].best < ends[2]]
    assert bounds[0].best > ends[2]
    # A bound says less than an answer: where it is the lower one, but the answer ends later, that comes second.
    swapped = [bounds[0], replace(bounds[1], **dict.fromkeys(vars(bounds[1]), 1.0)), bounds[2]]
    assert _contenders(problems, swapped) == [2, 1]
    assert _contenders(problems[:1], bounds[:1]) == [0]
