from __future__ import annotations

import itertools
import time as clock

import pytest
from hypothesis import given, settings

from plora.models.spec import ModelSpec
from plora.planner import Load, choose_checkpointing, pack_trials
from plora.planner.costs import budget_choices, make_costs
from plora.planner.solver import available_solvers
from plora.profiler import GPUS, MemoryModel, estimate
from tests.planner.instances import GIB, SMALL, grid, load, load_lists, model, problem

FREE = SMALL


def pack(loads, **options):
    memory = options.pop("memory", None) or model()
    return pack_trials(loads, memory, options.pop("free", FREE), time=estimate(GPUS["a10"], memory), **options)


@settings(max_examples=25, deadline=None)
@given(load_lists())
def test_every_trial_once_and_memory_kept(loads):
    packing = pack(loads, time_limit=2)
    by_name = {x.name: x for x in loads}
    assert sorted(name for p in packing.packs for name in p.trials) == sorted(by_name)
    memory = model()
    for p in packing.packs:
        members = [by_name[name] for name in p.trials]
        size = sum(memory.adapter_bytes(x.rank) for x in members)
        assert memory.parts_from_bytes(size, p.tokens, max(x.rank for x in members)).total == p.memory.total <= FREE
        assert p.tokens >= max(x.longest for x in members)
        assert p.rounds == max(x.steps for x in members)


@settings(max_examples=20, deadline=None)
@given(load_lists())
def test_the_program_is_never_worse_than_greedy(loads):
    assert pack(loads, time_limit=2).seconds <= pack(loads, solver="none").seconds * (1 + 1e-9)


def test_the_program_beats_greedy_where_even_packs_matter():
    kinds = [(64, 10, 128), (128, 10, 128), (8, 40, 32), (128, 500, 32), (64, 1500, 200)]
    kinds += [(16, 250, 64), (16, 250, 64), (16, 20, 64), (8, 750, 400), (16, 500, 100)]
    loads = [Load(f"t{i}", rank, steps, float(tokens), 512) for i, (rank, steps, tokens) in enumerate(kinds)]
    time = estimate(GPUS["h100"], model())
    exact, greedy = (pack_trials(loads, model(), 24 * GIB, time=time, solver=name) for name in ("auto", "none"))
    assert (exact.method, greedy.method) == ("ilp", "greedy")
    assert exact.seconds < 0.97 * greedy.seconds


def _set_partitions(items):
    if not items:
        yield []
        return
    head, *tail = items
    for rest in _set_partitions(tail):
        yield [[head], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [head, *rest[i]], *rest[i + 1 :]]


@pytest.mark.parametrize("seed", range(4))
def test_small_instances_reach_the_best_of_all_partitions(seed):
    kinds = list(itertools.product((16, 64, 128), (1, 4, 32), (32, 300)))
    loads = [
        load(f"t{i}", rank, batch, tokens=tokens, examples=300)
        for i, (rank, batch, tokens) in enumerate(kinds[(7 * seed + 5 * i) % len(kinds)] for i in range(6))
    ]
    given_problem = problem(loads)
    best = min(
        sum(costs.seconds(pack) for pack in packs)
        for costs in (make_costs(given_problem, 1, tokens) for tokens in budget_choices(given_problem, 1))
        for packs in _set_partitions(list(range(6)))
        if all(costs.fits(pack) for pack in packs)
    )
    found = pack(loads, gap=0.0).seconds - given_problem.time.cost(1).start
    assert found <= best * 1.02


def test_five_hundred_trials_are_as_easy_as_fifty():
    began = clock.perf_counter()
    packing = pack(grid(500), free=GPUS["h100"].free_bytes)
    assert clock.perf_counter() - began < 12
    assert sum(len(p.trials) for p in packing.packs) == 500


def test_packs_keep_to_max_adapters_and_token_budget():
    packing = pack(grid(12), max_adapters=3, token_budget=600)
    assert max(len(p.trials) for p in packing.packs) == 3
    assert {p.tokens for p in packing.packs} == {600}


def test_long_sequences_and_large_adapters_that_exclude_each_other_go_apart():
    long = load("long", 8, tokens=6000, longest=8000, batch=1)
    large = load("large", 128, longest=128, tokens=100, batch=1)
    packing = pack([long, large], free=int(21.5 * GIB))
    assert sorted(p.trials for p in packing.packs) == [("large",), ("long",)]


def test_what_fits_nowhere_is_refused_before_anything_is_solved():
    with pytest.raises(ValueError, match=r"trial a .* does not fit even alone: it needs .* are free"):
        pack([load("a")], free=10 * GIB)


@pytest.mark.parametrize("solver", available_solvers())
def test_each_solver_gives_the_same_quality(solver):
    loads = grid(24)
    assert pack(loads, solver=solver).seconds == pytest.approx(pack(loads).seconds, rel=0.01)


def test_solver_names_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="solver must be auto, none, highs or cbc, got 'gurobi'"):
        pack([load("a")], solver="gurobi")
    monkeypatch.setattr("pulp.listSolvers", lambda onlyAvailable: ["PULP_CBC_CMD"])  # noqa: N803
    with pytest.raises(ValueError, match="solver highs is not installed; installed: cbc"):
        pack([load("a")], solver="highs")


def test_without_a_solver_or_time_there_is_still_an_answer(monkeypatch, caplog):
    loads = grid(40)
    assert pack(loads, time_limit=0.0).packs
    monkeypatch.setattr("pulp.listSolvers", lambda onlyAvailable: [])  # noqa: N803
    packing = pack(loads)
    assert packing.method == "greedy"
    assert sum(len(p.trials) for p in packing.packs) == 40
    assert "planning greedily" in caplog.text


def test_checkpointing_is_used_only_where_it_pays():
    memory = MemoryModel(ModelSpec.preset("Qwen/Qwen2.5-7B"))
    loads = [load(f"t{i}", 64, longest=2048) for i in range(4)]
    for free, expected in ((GPUS["h100"].free_bytes, False), (GPUS["a10"].free_bytes, True)):
        chosen, packing = choose_checkpointing(loads, memory, free, time=lambda m: estimate(GPUS["a10"], m))
        assert chosen.activation_checkpointing is expected
        assert all(p.memory.total <= free for p in packing.packs)
