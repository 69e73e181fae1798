"""Packs for one device: which trials train together when packs run one after another.

The integer program, over groups ``g`` of trials that are alike (so 500 trials of 20 kinds are 20 variables a pack):

    minimise   sum_p D_p                                    predicted seconds of the packs
    subject to sum_p x_gp = n_g                             every trial once
               sum_g size_g x_gp <= room * y_p              memory, and likewise max_adapters
               x_gp <= n_g z_gp,  S_p >= steps_g z_gp       a pack takes as many rounds as its longest trial
               D_p >= floor S_p
               D_p >= a S_p + sum_g work_g x_gp             the time model, summed over the pack's rounds

with packs in order of ``S_p`` to break symmetry. A first-fit packing in order of falling steps is the answer to beat.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pulp

from plora.planner.costs import Costs, budget_choices, make_costs
from plora.planner.problem import Load, Problem, check_fits, group_loads
from plora.planner.solver import choose_solver, solve, whole
from plora.profiler.memory import MemoryModel, MemoryParts
from plora.profiler.time import TimeModel, default_time

logger = logging.getLogger(__name__)

# A smaller token budget is taken where it costs no more than this over the best: it leaves room for surprises.
BUDGET_SLACK = 1.01


@dataclass(frozen=True)
class Pack:
    """Trials that train together.

    Args:
        trials: their names.
        tokens: token budget of a microbatch.
        memory: predicted bytes on the device, by part.
        rounds: rounds until the last of them ends.
        seconds: predicted seconds, evaluation and saving included, start-up left out.
    """

    trials: tuple[str, ...]
    tokens: int
    memory: MemoryParts
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Packing:
    """Packs in the order in which they run on the one device.

    Args:
        packs: longest first.
        free_bytes: what was free when it was made.
        seconds: predicted seconds of all packs and one start-up.
        method: ``ilp`` or ``greedy``.
        estimated: whether the time model comes from a data sheet.
    """

    packs: tuple[Pack, ...]
    free_bytes: int
    seconds: float
    method: str
    estimated: bool


def pack_trials(
    loads: Sequence[Load],
    memory: MemoryModel,
    free_bytes: int,
    *,
    time: TimeModel | None = None,
    token_budget: int | None = None,
    max_adapters: int | None = None,
    generation: tuple[int, int] = (0, 0),
    solver: str = "auto",
    time_limit: float = 10.0,
    gap: float = 0.005,
) -> Packing:
    """Assign trials to packs that run one after another on one device.

    Args:
        loads: the trials (:func:`plora.planner.load_trials`).
        memory: the memory model.
        free_bytes: bytes free on the device before the base is loaded.
        time: the time model; None estimates one from the data sheet of an A100, or of this CPU.
        token_budget: tokens of a microbatch; None chooses the one with the least predicted time.
        max_adapters: most adapters in a pack; None for what fits.
        generation: rows and length of packed generation, ``(0, 0)`` for none.
        solver: ``auto``, ``highs``, ``cbc`` or ``none`` (greedy alone).
        time_limit: seconds for the solver.
        gap: relative gap at which the solver stops.

    Raises:
        ValueError: for contradictory limits, an unknown solver, or a trial that does not fit even alone.
    """
    engine = choose_solver(solver)
    problem = Problem(
        loads=tuple(loads),
        memory=memory,
        time=time or default_time(memory),
        free_bytes=free_bytes,
        token_budget=token_budget,
        max_adapters=max_adapters,
        generation=generation,
    )
    check_fits(problem)
    packs, method = _pack(problem, engine, time_limit, gap)
    return Packing(
        packs=tuple(sorted(packs, key=lambda pack: -pack.rounds)),
        free_bytes=free_bytes,
        seconds=problem.time.cost(1).start + sum(pack.seconds for pack in packs),
        method=method,
        estimated=problem.time.estimated,
    )


def _pack(problem: Problem, engine: str | None, time_limit: float, gap: float) -> tuple[list[Pack], str]:
    choices = [make_costs(problem, 1, tokens) for tokens in budget_choices(problem, 1)]
    if not choices:
        return _pack_halves(problem, engine, time_limit, gap)
    answers = [(costs, first_fit(costs)) for costs in choices]
    best = min(_seconds(costs, packs) for costs, packs in answers)
    costs, packs = next(pair for pair in answers if _seconds(*pair) <= BUDGET_SLACK * best)
    method = "greedy"
    if engine is not None and len(packs) > 1:
        better = solve_packs(costs, len(packs), engine, time_limit=time_limit, gap=gap)
        if better is not None and _seconds(costs, better) < _seconds(costs, packs):
            packs, method = better, "ilp"
    return [_describe(costs, members) for members in packs], method


def _pack_halves(problem: Problem, engine: str | None, time_limit: float, gap: float) -> tuple[list[Pack], str]:
    """Where the longest sequence of one trial does not fit beside the adapter of another: short and long apart."""
    assert len(problem.loads) > 1, "a single load that fits has a token budget"
    loads = sorted(problem.loads, key=lambda load: (load.longest, load.rank))
    middle = len(loads) // 2
    packs: list[Pack] = []
    methods = set()
    for half in (loads[:middle], loads[middle:]):
        some, method = _pack(replace(problem, loads=tuple(half)), engine, time_limit / 2, gap)
        packs += some
        methods.add(method)
    return packs, "ilp" if "ilp" in methods else "greedy"


def first_fit(costs: Costs, loads: Sequence[int] | None = None) -> list[list[int]]:
    """The better of two first-fit packings: by falling steps (packs of even length) and by falling size (fewest).

    Args:
        costs: the table; each load fits alone.
        loads: which loads; None for all.
    """
    loads = range(len(costs.problem.loads)) if loads is None else loads
    orders = (
        sorted(loads, key=lambda k: (-costs.steps[k], -costs.size[k])),
        sorted(loads, key=lambda k: (-costs.size[k], -costs.steps[k])),
    )
    return min((_first_fit(costs, order) for order in orders), key=lambda packs: _seconds(costs, packs))


def _first_fit(costs: Costs, order: Sequence[int]) -> list[list[int]]:
    packs: list[list[int]] = []
    filled: list[int] = []
    for k in order:
        size = costs.size[k]
        for index, pack in enumerate(packs):
            if filled[index] + size <= costs.room and len(pack) < costs.max_live:
                pack.append(k)
                filled[index] += size
                break
        else:
            packs.append([k])
            filled.append(size)
    return packs


def solve_packs(costs: Costs, n_packs: int, solver: str, *, time_limit: float, gap: float) -> list[list[int]] | None:
    """Solve the integer program of the module's head with at most ``n_packs`` packs; None without an answer in time."""
    groups = group_loads(costs.problem.loads)
    cost = costs.problem.time.cost(costs.degree)
    program = pulp.LpProblem("packs", pulp.LpMinimize)
    take, rounds, seconds = [], [], []
    longest = max(costs.steps)
    for p in range(n_packs):
        x = [program.add_variable(f"x_{g}_{p}", 0, len(group), pulp.LpInteger) for g, group in enumerate(groups)]
        z = [program.add_variable(f"z_{g}_{p}", cat=pulp.LpBinary) for g in range(len(groups))]
        s = program.add_variable(f"s_{p}", 0, longest)
        d = program.add_variable(f"d_{p}", 0)
        heads = [group[0] for group in groups]
        # Scaled by the room: the solver's tolerance is absolute, bytes are too large for it.
        program += pulp.lpSum(costs.size[k] / costs.room * v for k, v in zip(heads, x, strict=True)) <= 1
        program += pulp.lpSum(x) <= costs.max_live
        for g, group in enumerate(groups):
            program += x[g] <= len(group) * z[g]
            program += s >= costs.steps[group[0]] * z[g]
        program += d >= cost.floor * s
        program += d >= (cost.per_microbatch + cost.per_step) * s + pulp.lpSum(
            (costs.work[k] - costs.tail[k]) * v for k, v in zip(heads, x, strict=True)
        )
        take.append(x)
        rounds.append(s)
        seconds.append(d)
    program.setObjective(pulp.lpSum(seconds))
    for g, group in enumerate(groups):
        program += pulp.lpSum(x[g] for x in take) == len(group)
    for p in range(n_packs - 1):
        program += rounds[p] >= rounds[p + 1]
    if not solve(program, solver, time_limit=time_limit, gap=gap):
        return None
    return _read(costs, groups, take)


def _read(costs: Costs, groups: list[list[int]], take: list[list[pulp.LpVariable]]) -> list[list[int]] | None:
    left = [list(group) for group in groups]
    packs = []
    for x in take:
        members = []
        for g, variable in enumerate(x):
            for _ in range(whole(variable)):
                members.append(left[g].pop(0))
        if members:
            packs.append(members)
    # Rounding within the solver's tolerance may overfill a pack by a hair: then the greedy answer stands.
    if any(left) or not all(costs.fits(members) for members in packs):
        logger.warning("the solver's packs exceed the memory by its tolerance: keeping the greedy answer")
        return None
    return packs


def _seconds(costs: Costs, packs: Sequence[Sequence[int]]) -> float:
    return sum(costs.seconds(members) for members in packs)


def _describe(costs: Costs, members: Sequence[int]) -> Pack:
    problem = costs.problem
    loads = [problem.loads[k] for k in members]
    memory = problem.memory.parts_from_bytes(
        sum(costs.size[k] for k in members),
        costs.tokens,
        max(load.rank for load in loads),
        generation=problem.generation,
    )
    return Pack(
        trials=tuple(load.name for load in loads),
        tokens=costs.tokens,
        memory=memory,
        rounds=max(costs.steps[k] for k in members),
        seconds=costs.seconds(members),
    )


def choose_checkpointing(
    loads: Sequence[Load],
    memory: MemoryModel,
    free_bytes: int,
    *,
    time: Callable[[MemoryModel], TimeModel] = default_time,
    **options: Any,
) -> tuple[MemoryModel, Packing]:
    """Pack with and without activation checkpointing and keep what is predicted to end first.

    Args:
        loads: as for :func:`pack_trials`.
        memory: as for :func:`pack_trials`.
        free_bytes: as for :func:`pack_trials`.
        time: makes the time model that belongs to a memory model (recomputation takes time).
        **options: as for :func:`pack_trials`.

    Returns:
        ``memory`` with ``activation_checkpointing`` decided, and its packing.

    Raises:
        ValueError: as :func:`pack_trials`, if trials fit neither way.
    """
    recomputing = replace(memory, activation_checkpointing=True)
    answer = recomputing, pack_trials(loads, recomputing, free_bytes, time=time(recomputing), **options)
    saving = replace(memory, activation_checkpointing=False)
    try:
        packing = pack_trials(loads, saving, free_bytes, time=time(saving), **options)
    except ValueError as error:
        logger.info("activation checkpointing is needed: %s", error)
        return answer
    return (saving, packing) if packing.seconds <= answer[1].seconds else answer
