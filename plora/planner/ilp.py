"""PLoRA's F(d, K): the pack on ``d`` devices with the best throughput, as an integer program over kinds of trials.

The paper's objective is a ratio, ``sum_k w_k x_k / T(x)``, whose time depends on the pack. Dinkelbach's method (1967)
solves it as a few programs ``max sum_k w_k x_k - q T(x)`` with ``q`` the best ratio so far, until the optimum is 0.

* ``rank_throughput`` (the paper): ``w_k`` is the rank, ``T`` a round:
  ``T >= m floor + o P`` and ``T >= m a + b N + c sum n_k r_k x_k + e sum x_k + o P`` with ``m >= N / budget`` whole.
* ``makespan``: ``w_k`` is the trial's least device-seconds, ``T`` the whole job with its start-up:
  ``T >= start + floor S`` and ``T >= start + (a + o0) S + sum work_k x_k`` with ``S`` the steps of its longest trial.

The paper's program fills one device group whatever the others do. Here a pack takes no more than ``share`` of the work
left, so that the last packs do not leave devices idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pulp

from plora.planner.costs import Costs
from plora.planner.jobs import Workshop
from plora.planner.problem import group_loads
from plora.planner.solver import solve, whole

MAX_ITERATIONS = 8
# Relative gap at which a program is solved well enough: the cost model is no more exact.
GAP = 1e-3


@dataclass(frozen=True)
class Packed:
    """A pack and the ratio that chose it."""

    members: tuple[int, ...]
    throughput: float


@dataclass(frozen=True)
class _Kinds:
    """Remaining loads that are alike, with what the program needs of one of them."""

    members: list[list[int]]
    weights: list[float]


def best_pack(
    workshop: Workshop, degree: int, remaining: Sequence[int], share: float, *, solver: str | None, time_limit: float
) -> Packed | None:
    """Solve F(d, K).

    Args:
        workshop: the problem's tables.
        degree: ``d``.
        remaining: ``K``, indices of loads.
        share: seconds of work at this degree that the pack may hold; one trial may always be in it.
        solver: solver's name; None takes loads one by one while the ratio grows.
        time_limit: seconds for all iterations together.

    Returns:
        The pack, or None if no remaining load fits at this degree.
    """
    costs = _table(workshop, degree, remaining)
    if costs is None:
        return None
    kinds = _kinds(workshop, costs, remaining)
    best = _one_by_one(workshop, costs, kinds, share)
    if solver is None:
        return best
    for _ in range(MAX_ITERATIONS):
        members = _solve(workshop, costs, kinds, share, best.throughput, solver, time_limit / MAX_ITERATIONS)
        if not members:
            break
        ratio = _ratio(workshop, costs, members)
        if ratio <= best.throughput * (1 + 1e-6):
            break
        best = Packed(tuple(sorted(members)), ratio)
    return best


def _table(workshop: Workshop, degree: int, remaining: Sequence[int]) -> Costs | None:
    tables = workshop.tables.get(degree, [])
    counts = [sum(costs.eligible[k] for k in remaining) for costs in tables]
    if not counts or max(counts) == 0:
        return None
    # Of the tables that take most loads, the middle one: neither the smallest budget nor the largest.
    best = [costs for costs, count in zip(tables, counts, strict=True) if count == max(counts)]
    return best[len(best) // 2]


def _kinds(workshop: Workshop, costs: Costs, remaining: Sequence[int]) -> _Kinds:
    members = group_loads(workshop.problem.loads, (k for k in remaining if costs.eligible[k]))
    return _Kinds(members, [_weight(workshop, group[0]) for group in members])


def _weight(workshop: Workshop, k: int) -> float:
    if workshop.problem.objective == "rank_throughput":
        return float(workshop.problem.loads[k].rank)
    return min(degree * workshop.work(degree, k) for degree in workshop.degrees)


class _Sums:
    """A growing pack's ratio from running sums, with the program's own time formula."""

    def __init__(self, workshop: Workshop, costs: Costs) -> None:
        self.workshop, self.costs = workshop, costs
        self.members: list[int] = []
        self.weight = self.work = self.linear = self.fixed = 0.0
        self.tokens = self.extra = 0.0
        self.size = self.params = self.steps = 0

    def ratio_with(self, k: int) -> float:
        """The ratio once load ``k`` is in the pack."""
        costs, step = self.costs, self.costs.step
        weight = self.weight + _weight(self.workshop, k)
        if self.workshop.problem.objective == "rank_throughput":
            return weight / costs.round_of_sums(
                self.tokens + costs.step_tokens[k],
                self.extra + costs.step_extra[k],
                len(self.members) + 1,
                self.params + costs.params[k],
            )
        steps = max(self.steps, costs.steps[k])
        rounds = max(step.floor * steps, self.linear + costs.linear[k]) + step.per_step * steps
        return weight / (costs.start + rounds + self.fixed + costs.work[k] - costs.linear[k])

    def takes(self, k: int, share: float) -> bool:
        """Whether load ``k`` still fits: in memory, in places and in the share of the work."""
        costs = self.costs
        return (
            self.work + costs.work[k] <= share
            and self.size + costs.size[k] <= costs.room
            and len(self.members) < costs.max_live
        )

    def add(self, k: int) -> None:
        """Put load ``k`` in."""
        costs = self.costs
        self.members.append(k)
        self.weight += _weight(self.workshop, k)
        self.work += costs.work[k]
        self.linear += costs.linear[k]
        self.fixed += costs.work[k] - costs.linear[k]
        self.tokens += costs.step_tokens[k]
        self.extra += costs.step_extra[k]
        self.size += costs.size[k]
        self.params += costs.params[k]
        self.steps = max(self.steps, costs.steps[k])


def _ratio(workshop: Workshop, costs: Costs, members: Sequence[int]) -> float:
    sums = _Sums(workshop, costs)
    for k in members[:-1]:
        sums.add(k)
    return sums.ratio_with(members[-1])


def _one_by_one(workshop: Workshop, costs: Costs, kinds: _Kinds, share: float) -> Packed:
    """The greedy pack: the best single load, then whichever raises the ratio, in order of falling steps."""
    order = sorted((k for group in kinds.members for k in group), key=lambda k: (-costs.steps[k], k))
    sums = _Sums(workshop, costs)
    first = max((group[0] for group in kinds.members), key=sums.ratio_with)
    ratio = sums.ratio_with(first)
    sums.add(first)
    for k in order:
        if k != first and sums.takes(k, share) and (grown := sums.ratio_with(k)) >= ratio:
            sums.add(k)
            ratio = grown
    return Packed(tuple(sorted(sums.members)), ratio)


def _solve(
    workshop: Workshop, costs: Costs, kinds: _Kinds, share: float, ratio: float, solver: str, time_limit: float
) -> list[int] | None:
    heads = [group[0] for group in kinds.members]
    program = pulp.LpProblem("pack", pulp.LpMaximize)
    x = [program.add_variable(f"x_{g}", 0, len(group), pulp.LpInteger) for g, group in enumerate(kinds.members)]
    seconds = program.add_variable("seconds", 0)
    scale = max(kinds.weights)
    program.setObjective(
        pulp.lpSum(w / scale * v for w, v in zip(kinds.weights, x, strict=True)) - ratio / scale * seconds
    )
    program += pulp.lpSum(costs.size[k] / costs.room * v for k, v in zip(heads, x, strict=True)) <= 1
    program += pulp.lpSum(x) <= costs.max_live
    program += pulp.lpSum(x) >= 1
    if share < float("inf"):
        most = max(share, *(costs.work[k] for k in heads))
        program += pulp.lpSum(costs.work[k] * v for k, v in zip(heads, x, strict=True)) <= most
    if workshop.problem.objective == "rank_throughput":
        _round_time(program, costs, heads, x, seconds)
    else:
        _job_time(program, costs, kinds, x, seconds)
    if not solve(program, solver, time_limit=time_limit, gap=GAP):
        return None
    members = [k for group, v in zip(kinds.members, x, strict=True) for k in group[: whole(v)]]
    # The solver's tolerance may overfill the memory by a hair.
    return members if members and costs.fits(members) else None


def _round_time(
    program: pulp.LpProblem, costs: Costs, heads: list[int], x: list[pulp.LpVariable], seconds: pulp.LpVariable
) -> None:
    step = costs.step
    most = max(1, int(sum(costs.step_tokens) / costs.tokens) + 1)
    m = program.add_variable("microbatches", 1, most, pulp.LpInteger)
    program += costs.tokens * m >= pulp.lpSum(costs.step_tokens[k] * v for k, v in zip(heads, x, strict=True))
    optimizer = pulp.lpSum(costs.params[k] * step.per_param * v for k, v in zip(heads, x, strict=True)) + step.per_step
    program += seconds >= step.floor * m + optimizer
    program += seconds >= step.full_microbatch * m + optimizer + pulp.lpSum(
        (costs.step_tokens[k] * step.per_token + costs.step_extra[k] + step.per_adapter) * v
        for k, v in zip(heads, x, strict=True)
    )


def _job_time(
    program: pulp.LpProblem, costs: Costs, kinds: _Kinds, x: list[pulp.LpVariable], seconds: pulp.LpVariable
) -> None:
    step = costs.step
    heads = [group[0] for group in kinds.members]
    rounds = program.add_variable("rounds", 0)
    for g, group in enumerate(kinds.members):
        z = program.add_variable(f"z_{g}", cat=pulp.LpBinary)
        program += x[g] <= len(group) * z
        program += rounds >= costs.steps[group[0]] * z
    fixed = pulp.lpSum(
        (costs.tail[k] + costs.steps[k] * costs.params[k] * step.per_param) * v for k, v in zip(heads, x, strict=True)
    )
    program += seconds >= costs.start + (step.floor + step.per_step) * rounds + fixed
    program += seconds >= costs.start + step.per_step * rounds + fixed + pulp.lpSum(
        costs.linear[k] * v for k, v in zip(heads, x, strict=True)
    )
