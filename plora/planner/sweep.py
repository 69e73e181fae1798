"""From a sweep's trials and a kind of device to a plan: fills in degrees, cost models and checkpointing."""

from __future__ import annotations

import logging
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from plora.planner.baselines import baselines
from plora.planner.bounds import Bounds, lower_bounds
from plora.planner.greedy import greedy
from plora.planner.jobs import Workshop, makespan, place
from plora.planner.plan import Plan
from plora.planner.planner import make_plan
from plora.planner.problem import Load, Problem, check_fits, legal_degrees
from plora.profiler.hardware import GPU
from plora.profiler.memory import MemoryModel
from plora.profiler.time import TimeModel, estimate, one_at_a_time

logger = logging.getLogger(__name__)


def plan_on(
    loads: Sequence[Load],
    memories: Sequence[MemoryModel],
    gpu: GPU | None,
    count: int,
    *,
    time: Callable[[MemoryModel], TimeModel] | None = None,
    free_bytes: int | None = None,
    degrees: Sequence[int] | None = None,
    token_budget: int | None = None,
    max_adapters: int | None = None,
    generation: tuple[int, int] = (0, 0),
    objective: str = "makespan",
    is_loaded: bool = False,
    time_limit: float = 15.0,
    **options: Any,
) -> tuple[Problem, Plan]:
    """Plan on devices that need not be here.

    Args:
        loads: the trials.
        memories: memory models to choose among, e.g. without and with activation checkpointing; the cost of
            recomputation is in the time model that belongs to each.
        gpu: the devices' data sheet (:func:`plora.profiler.find_gpu`); None where there is none, as for a CPU: then
            ``time`` and ``free_bytes`` are needed.
        count: how many.
        time: the time model that belongs to a memory model; None estimates it from the data sheet.
        free_bytes: bytes free on each device; None for what the data sheet leaves.
        degrees: tensor-parallel degrees allowed; None for all that suit the model.
        token_budget: tokens of a microbatch; None lets the planner choose.
        max_adapters: adapters alive in a job at a time; None for what fits.
        generation: rows and length of packed generation.
        objective: ``makespan`` or ``rank_throughput``.
        is_loaded: whether the base is on the devices already.
        time_limit: seconds after which no further search starts.
        **options: of :func:`plora.planner.make_plan`.

    Returns:
        The problem whose plan ends first (its ``memory`` says whether checkpointing and CUDA graphs are on), and the
        plan. Its bound and its baselines are the least under any of the memory models: what trains one at a time may
        have room for graphs, or for activations, where packs do better without.

    Raises:
        ValueError: if there are no devices, limits contradict, or a trial fits under none of the memory models.
    """
    problems, misfits = [], []
    for memory in memories:
        problem = make_problem(
            loads, memory, gpu, count, time=time, free_bytes=free_bytes, degrees=degrees, token_budget=token_budget,
            max_adapters=max_adapters, generation=generation, objective=objective, is_loaded=is_loaded,
        )  # fmt: skip
        try:
            check_fits(problem)
        except ValueError as error:
            misfits.append((memory, error))
        else:
            problems.append(problem)
    if not problems:
        assert misfits, "at least one memory model"
        raise misfits[-1][1]
    for memory, misfit in misfits:
        logger.info(
            "left out (checkpointing %s, CUDA graphs up to %d tokens): %s",
            memory.activation_checkpointing, memory.graph_tokens, misfit,
        )  # fmt: skip
    return _soonest(problems, gpu, time_limit, options)


def make_problem(
    loads: Sequence[Load],
    memory: MemoryModel,
    gpu: GPU | None,
    count: int,
    *,
    time: Callable[[MemoryModel], TimeModel] | None = None,
    free_bytes: int | None = None,
    degrees: Sequence[int] | None = None,
    **limits: Any,
) -> Problem:
    """What is to be planned with one memory model; arguments as :func:`plan_on`, ``limits`` of ``Problem``.

    Raises:
        ValueError: if there are no devices, or limits contradict.
    """
    if count < 1:
        raise ValueError(f"hardware.count must be at least 1, got {count}")
    if gpu is not None:
        free_bytes = gpu.free_bytes if free_bytes is None else free_bytes
    assert free_bytes is not None, "without a data sheet, time and free_bytes are needed"
    allowed = tuple(sorted(degrees)) if degrees is not None else legal_degrees(memory.spec, count)
    return Problem(
        loads=tuple(loads),
        memory=memory,
        time=_time(time, gpu, memory, allowed),
        free_bytes=free_bytes,
        n_devices=count,
        degrees=allowed,
        **limits,
    )


def _time(
    given: Callable[[MemoryModel], TimeModel] | None, gpu: GPU | None, memory: MemoryModel, degrees: Sequence[int]
) -> TimeModel:
    if given is not None:
        return given(memory)
    assert gpu is not None, "without a data sheet, time and free_bytes are needed"
    return estimate(gpu, memory, degrees)


def _soonest(
    problems: list[Problem], gpu: GPU | None, time_limit: float, options: dict[str, Any]
) -> tuple[Problem, Plan]:
    deadline = clock.monotonic() + time_limit
    bounds = [lower_bounds(problem) for problem in problems]
    best: tuple[Problem, Plan] | None = None
    contenders = _contenders(problems, bounds)
    for i in contenders:
        if best is not None and best[1].makespan <= bounds[i].best:
            continue
        left = deadline - clock.monotonic()
        # The first is the likely winner; the next may need no look at all.
        share = left if best is not None or len(contenders) == 1 else 0.7 * left
        plan = make_plan(problems[i], time_limit=share, **options)
        # Not by what rounding makes of two equal times.
        if best is None or plan.makespan < best[1].makespan * (1 - 1e-9):
            best = problems[i], plan
    assert best is not None
    lowest = min(bounds, key=lambda each: each.best)
    return best[0], replace(
        best[1], lower_bound=lowest.best, bound_reason=lowest.reason, baselines=_least_baselines(problems, gpu)
    )


def _least_baselines(problems: Sequence[Problem], gpu: GPU | None) -> dict[str, float]:
    ends: dict[str, float] = {}
    for problem in problems:
        for name, end in baselines(problem, one_at_a_time(problem.time, problem.memory, gpu)).items():
            ends[name] = min(end, ends.get(name, end))
    return ends


def _contenders(problems: Sequence[Problem], bounds: Sequence[Bounds]) -> list[int]:
    """Problems that may have the soonest plan, by where the greedy answer ends: those left out end later than that of
    another, by their bound.
    """
    if len(problems) == 1:
        return [0]
    ends: dict[int, float] = {}
    for i in sorted(range(len(problems)), key=lambda i: bounds[i].best):
        if bounds[i].best < min(ends.values(), default=float("inf")):
            ends[i] = makespan(place(greedy(Workshop(problems[i])), problems[i].n_devices))
    return sorted(ends, key=lambda i: (ends[i], i))
