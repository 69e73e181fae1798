"""Problems that the planner's tests share."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from plora.models.spec import ModelSpec
from plora.planner import Load, Plan, Problem, legal_degrees
from plora.profiler import GPUS, MemoryModel, estimate

GIB = 1 << 30
SMALL = 23 * GIB
RANKS = (8, 16, 32, 64, 128)
BATCHES = (1, 2, 4, 8, 16, 32)


def model(checkpointing: bool = True) -> MemoryModel:
    return MemoryModel(ModelSpec.preset("Qwen/Qwen2.5-7B"), "bf16", activation_checkpointing=checkpointing)


def load(
    name: str, rank: int = 16, batch: int = 8, *, tokens: int = 200, examples: int = 1000, longest: int = 512
) -> Load:
    return Load(name, rank, -(-examples // batch), float(batch * tokens), longest)


def problem(loads: list[Load], *, gpu: str = "a10", count: int = 1, free: int | None = None, **limits) -> Problem:
    """On ``count`` devices of 23 GiB a 7B base leaves about 6 GiB at degree 1: memory matters, yet every load fits."""
    memory = limits.pop("memory", None) or model()
    degrees = limits.pop("degrees", None) or legal_degrees(memory.spec, count)
    return Problem(
        loads=tuple(loads),
        memory=memory,
        time=estimate(GPUS[gpu], memory, degrees),
        free_bytes=SMALL if free is None and gpu == "a10" else GPUS[gpu].free_bytes if free is None else free,
        n_devices=count,
        degrees=degrees,
        **limits,
    )


def grid(count: int) -> list[Load]:
    """Loads over all ranks and batch sizes, kinds repeating."""
    kinds = [(rank, batch) for rank in RANKS for batch in BATCHES]
    return [load(f"t{i:03d}", *kinds[i % len(kinds)]) for i in range(count)]


@st.composite
def load_lists(draw, most: int = 12) -> list[Load]:
    count = draw(st.integers(1, most))
    return [
        load(
            f"t{i:03d}",
            draw(st.sampled_from(RANKS)),
            draw(st.sampled_from(BATCHES)),
            tokens=draw(st.sampled_from((32, 200, 1000))),
            examples=draw(st.sampled_from((40, 500, 3000))),
            longest=draw(st.sampled_from((128, 1024, 2048))),
        )
        for i in range(count)
    ]


@st.composite
def problems(draw, most: int = 12) -> Problem:
    return problem(
        draw(load_lists(most)),
        gpu=draw(st.sampled_from(("a10", "h100"))),
        count=draw(st.sampled_from((1, 2, 3, 4, 8))),
        max_adapters=draw(st.sampled_from((None, 2))),
    )


def assert_sound(plan: Plan, given: Problem) -> None:
    """Every trial once, each device in one job at a time, memory and places kept at every round."""
    names = [trial.name for job in plan.jobs for trial in job.trials]
    assert sorted(names) == sorted(load.name for load in given.loads)
    loads = {load.name: load for load in given.loads}
    for job in plan.jobs:
        assert all(0 <= device < given.n_devices for device in job.devices)
        assert len(set(job.devices)) == job.degree
        assert job.degree in given.degrees
        for mark in {trial.start_round for trial in job.trials}:
            live = [loads[t.name] for t in job.trials if t.start_round <= mark < t.end_round]
            size = sum(given.memory.adapter_bytes(x.rank, x.target_modules, job.degree) for x in live)
            need = given.memory.parts_from_bytes(
                size, job.token_budget, max(x.rank for x in live), degree=job.degree, generation=given.generation
            )
            assert need.total <= given.free_bytes
            assert max(x.longest for x in live) <= job.token_budget
            assert given.max_adapters is None or len(live) <= given.max_adapters
        assert job.memory_bytes <= given.free_bytes
    for device in range(given.n_devices):
        spans = sorted((job.start, job.end) for job in plan.jobs if device in job.devices)
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert start >= end - 1e-9 * end
    assert abs(plan.makespan - max(job.end for job in plan.jobs)) < 1e-9 * plan.makespan
