"""What a sweep on the one device here asks of the planner."""

from __future__ import annotations

import logging
import time as clock
from dataclasses import replace

import pytest

from plora.planner import Load, plan_on
from plora.planner.baselines import BEST, baselines
from plora.planner.bounds import lower_bounds
from plora.planner.solver import available_solvers
from plora.profiler import GPUS, estimate, one_at_a_time
from tests.planner.instances import GIB, SMALL, assert_sound, grid, load, model


def plan(loads, *, gpu="a10", free=SMALL, memories=None, **options):
    options = {"time_limit": 5.0, **options}
    return plan_on(loads, memories or [model()], GPUS[gpu], 1, free_bytes=free, **options)


def test_five_hundred_trials_are_as_easy_as_fifty():
    began = clock.perf_counter()
    given_problem, made = plan(grid(500), gpu="h100", free=GPUS["h100"].free_bytes)
    assert clock.perf_counter() - began < 15
    assert_sound(made, given_problem)
    assert made.gap < 0.02


def test_jobs_keep_to_max_adapters_and_token_budget():
    given_problem, made = plan(grid(12), max_adapters=3, token_budget=600)
    assert_sound(made, given_problem)
    assert {job.token_budget for job in made.jobs} == {600}


def test_the_base_is_loaded_once_however_many_jobs_there_are():
    loads = [
        load("long", 8, tokens=6000, longest=8000, batch=1),
        load("large", 128, longest=128, tokens=100, batch=1),
    ]
    given_problem, made = plan(loads, free=int(21.5 * GIB))
    assert len(made.jobs) == 2
    load_seconds = estimate(GPUS["a10"], model()).cost(1)
    load_seconds = load_seconds.load + load_seconds.compile
    assert made.load_seconds == pytest.approx(load_seconds)
    assert made.makespan == pytest.approx(load_seconds + sum(job.seconds for job in made.jobs))
    _, loaded = plan(loads, free=int(21.5 * GIB), is_loaded=True)
    assert loaded.makespan == pytest.approx(made.makespan - load_seconds)
    assert loaded.load_seconds == 0
    assert_sound(loaded, given_problem)


@pytest.mark.parametrize("solver", [*available_solvers(), "none"])
def test_each_solver_gives_a_plan_of_the_same_quality(solver):
    loads = grid(24)
    assert plan(loads, solver=solver)[1].makespan == pytest.approx(plan(loads)[1].makespan, rel=0.01)


def test_solver_names_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="solver must be auto, none, highs or cbc, got 'gurobi'"):
        plan([load("a")], solver="gurobi")
    monkeypatch.setattr("pulp.listSolvers", lambda onlyAvailable: ["PULP_CBC_CMD"])  # noqa: N803
    with pytest.raises(ValueError, match=r"highs is not installed; installed: cbc\. Use auto, or pip install highspy"):
        plan([load("a")], solver="highs")


def test_checkpointing_is_used_only_where_it_pays():
    memories = [model(checkpointing=False), model(checkpointing=True)]
    loads = [load(f"t{i}", 64, longest=2048) for i in range(4)]
    for gpu, expected in (("h100", False), ("a10", True)):
        chosen, made = plan(loads, gpu=gpu, free=GPUS[gpu].free_bytes, memories=memories)
        assert chosen.memory.activation_checkpointing is expected
        assert (made.recomputed_layers > 0) is expected
        assert_sound(made, chosen)


def test_a_plan_is_compared_with_what_is_best_under_any_of_the_memory_models():
    # Six adapters of rank 256 fit only without the graphs' memory; one at a time has room for it and is quicker with.
    plain = replace(model(checkpointing=False), compiled=True)
    memories = [replace(plain, graph_tokens=2048), plain]
    loads = [Load(f"t{i}", 256, 500, 8 * 200.0, 512) for i in range(6)]
    chosen, made = plan(loads, gpu="h100", free=GPUS["h100"].free_bytes, memories=memories)
    assert made.graph_tokens == 0
    others = [replace(chosen, memory=memory, time=estimate(GPUS["h100"], memory)) for memory in memories]
    ends = [baselines(each, one_at_a_time(each.time, each.memory, GPUS["h100"]))[BEST] for each in others]
    assert ends[0] < 0.95 * ends[1]
    assert made.baselines[BEST] == pytest.approx(ends[0])
    bounds = [lower_bounds(each).best for each in others]
    assert made.lower_bound == min(bounds)


def test_a_memory_model_that_does_not_fit_is_logged_only_where_another_does(caplog):
    loads = [load("a", 8, longest=2048, tokens=2000)]
    tight = model(checkpointing=True).parts_from_bytes(model().adapter_bytes(8), 2048, 8).total
    memories = [model(checkpointing=False), model(checkpointing=True)]
    with caplog.at_level(logging.INFO, logger="plora"):
        plan(loads, free=tight, memories=memories)
        assert [record.message[:8] for record in caplog.records] == ["left out"]
        caplog.clear()
        with pytest.raises(ValueError, match="does not fit even alone"):
            plan(loads, free=tight - (2 << 30), memories=memories)
    assert caplog.records == []
