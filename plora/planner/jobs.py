"""Jobs before they are placed: which rounds each member of a job runs in, and when jobs run on which devices.

A job is a device group that keeps one copy of the base and trains its members with refilling: a waiting member joins
when others have ended and made room. The members of a job and its degree determine it; :class:`Workshop` finds the
best token budget and order of joining and remembers them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from plora.planner.costs import Costs, tabulate
from plora.planner.problem import Problem

# A job within this of its own lower bound is not searched any further.
GOOD_ENOUGH = 1.002


@dataclass(frozen=True)
class Draft:
    """A job without devices.

    Args:
        costs: the table of its degree and token budget.
        members: indices of its loads.
        starts: the round in which each member joins.
        seconds: predicted seconds, start-up included.
        memory_bound: whether a member had to wait for memory.
    """

    costs: Costs
    members: tuple[int, ...]
    starts: tuple[int, ...]
    seconds: float
    memory_bound: bool = False

    @property
    def degree(self) -> int:
        """Devices it takes."""
        return self.costs.degree


@dataclass(frozen=True)
class Placed:
    """A job on devices ``[first_device, first_device + degree)`` from second ``start``."""

    draft: Draft
    first_device: int
    start: float

    @property
    def end(self) -> float:
        """Second at which it ends."""
        return self.start + self.draft.seconds


class _Measures(NamedTuple):
    tables: frozenset[int]
    work: float
    chain: float
    excess: float


class Workshop:
    """Makes drafts of a problem and remembers them: planners ask for the same jobs again and again."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.tables = tabulate(problem)
        self._measures = {
            degree: [self._measure(degree, k) for k in range(len(problem.loads))] for degree in self.tables
        }
        self._drafts: dict[tuple[int, frozenset[int]], Draft | None] = {}

    @property
    def degrees(self) -> list[int]:
        """Degrees at which anything fits, ascending."""
        return sorted(self.tables)

    def table(self, degree: int, k: int) -> Costs | None:
        """A table at this degree in which load ``k`` fits alone; None if there is none."""
        return next((costs for costs in self.tables.get(degree, ()) if costs.eligible[k]), None)

    def tables_of(self, degree: int, k: int) -> frozenset[int]:
        """Which of the tables of this degree take load ``k``: members of a job need one in common."""
        return self._measures[degree][k].tables

    def work(self, degree: int, k: int) -> float:
        """Seconds that load ``k`` adds to a job of this degree; infinite where it does not fit."""
        return self._measures[degree][k].work

    def chain(self, degree: int, k: int) -> float:
        """Seconds of load ``k`` alone at this degree, start-up included; infinite where it does not fit."""
        return self._measures[degree][k].chain

    def excess(self, degree: int, k: int) -> float:
        """Seconds that load ``k`` adds to rounds which take the launch floor anyway; infinite where it does not fit."""
        return self._measures[degree][k].excess

    def _measure(self, degree: int, k: int) -> _Measures:
        fitting = frozenset(i for i, costs in enumerate(self.tables[degree]) if costs.eligible[k])
        if not fitting:
            return _Measures(fitting, math.inf, math.inf, math.inf)
        costs = self.tables[degree][min(fitting)]
        for i in fitting:
            if self.tables[degree][i].work[k] < costs.work[k]:
                costs = self.tables[degree][i]
        return _Measures(
            fitting,
            costs.work[k],
            costs.start + costs.chain_seconds(k),
            costs.tail[k]
            + costs.steps[k] * costs.params[k] * costs.step.per_param
            + max(0.0, costs.linear[k] - costs.steps[k] * costs.step.floor),
        )

    def draft(self, degree: int, members: frozenset[int]) -> Draft | None:
        """The best job found for these members; None if one of them does not fit at this degree."""
        key = degree, members
        if key not in self._drafts:
            self._drafts[key] = self._make(degree, sorted(members))
        return self._drafts[key]

    def _make(self, degree: int, members: list[int]) -> Draft | None:
        best: Draft | None = None
        for costs in sorted(self.tables.get(degree, ()), key=lambda costs: -costs.tokens):
            if not all(costs.eligible[k] for k in members):
                continue
            draft = order_rounds(costs, members)
            if best is None or draft.seconds < best.seconds:
                best = draft
            if not draft.memory_bound:
                break  # a smaller microbatch would only make room that nobody needs
        return best


def order_rounds(costs: Costs, members: Sequence[int]) -> Draft:
    """Choose when members join: longest first as memory allows, with several caps on the tokens of a round.

    Letting everyone in at once is best while rounds cost what their tokens cost. Where a few long trials would be left
    at the launch floor, a cap spreads the others over the long ones' rounds: those below the cap share it, of those
    above it one runs at a time.
    """
    order = sorted(members, key=lambda k: (-costs.steps[k], -costs.size[k], k))
    bound = max(
        sum(costs.work[k] for k in members) + costs.step.per_step * max(costs.steps[k] for k in members),
        max(costs.chain_seconds(k) for k in members),
    )
    best: _Rounds | None = None
    for cap in _token_caps(costs, members):
        rounds = _list_rounds(costs, order, cap)
        if best is None or rounds.seconds < best.seconds:
            best = rounds
        if best.seconds <= GOOD_ENOUGH * bound:
            break
    assert best is not None
    joined = sorted(zip(best.starts, order, strict=True))
    return Draft(
        costs=costs,
        members=tuple(k for _, k in joined),
        starts=tuple(start for start, _ in joined),
        seconds=costs.start + best.seconds,
        memory_bound=best.memory_bound,
    )


def _token_caps(costs: Costs, members: Sequence[int]) -> list[float]:
    total = sum(costs.steps[k] * costs.step_tokens[k] for k in members)
    rounds = max(
        max(costs.steps[k] for k in members),
        sum(costs.steps[k] * costs.size[k] for k in members) / costs.room,
        sum(costs.steps[k] for k in members) / costs.max_live,
    )
    level = total / rounds
    # What a round at the launch floor holds for nothing.
    per_token = costs.step.per_token + costs.step.per_label
    floor = costs.step.floor / per_token if per_token > 0 else level
    caps = [floor, 1.3 * level] if len(members) > 60 else [floor, 1.2 * floor, 1.3 * level, float(costs.tokens)]
    everything = sum(costs.step_tokens[k] for k in members)
    return [float("inf"), *(cap for cap in caps if cap < everything)]


class _Rounds(NamedTuple):
    seconds: float
    starts: list[int]
    memory_bound: bool  # whether someone had to wait for memory


def _list_rounds(costs: Costs, order: Sequence[int], cap: float) -> _Rounds:
    """List scheduling: at every change admit, in order, whoever fits."""
    room, max_live = costs.room, costs.max_live
    sizes, step_tokens, step_extra, params = costs.size, costs.step_tokens, costs.step_extra, costs.params
    starts = [0] * len(order)
    waiting = list(range(len(order)))
    live: list[tuple[int, int]] = []  # (end, position in order)
    now, seconds, size, memory_bound = 0, sum(costs.tail[k] for k in order), 0, False
    tokens, extra, parameters = 0.0, 0.0, 0
    totals = []  # tokens of rounds
    small, big = 0.0, 0  # tokens of the live loads below the cap; live loads above it
    while waiting or live:
        held = []
        for place, i in enumerate(waiting):
            if len(live) >= max_live:
                held += waiting[place:]
                break
            k = order[i]
            mine = step_tokens[k]
            if size + sizes[k] > room:
                memory_bound = True
                held.append(i)
                continue
            if big > 0 if mine > cap else small + mine > cap:
                held.append(i)
                continue
            if mine > cap:
                big += 1
            else:
                small += mine
            starts[i] = now
            heapq.heappush(live, (now + costs.steps[k], i))
            size += sizes[k]
            tokens += mine
            extra += step_extra[k]
            parameters += params[k]
        waiting = held
        end = live[0][0]
        totals.append(tokens)
        seconds += (end - now) * costs.round_of_sums(tokens, extra, len(live), parameters)
        now = end
        while live and live[0][0] == now:
            k = order[heapq.heappop(live)[1]]
            mine = step_tokens[k]
            if mine > cap:
                big -= 1
            else:
                small -= mine
            size -= sizes[k]
            tokens -= mine
            extra -= step_extra[k]
            parameters -= params[k]
    return _Rounds(seconds + costs.graph_seconds(totals), starts, memory_bound)


def place(drafts: Sequence[Draft], n_devices: int) -> list[Placed]:
    """Put jobs, in the order given, each on the aligned device group that is free first; each device loads once."""
    free = [drafts[0].costs.problem.load_seconds if drafts else 0.0] * n_devices
    placed = []
    for draft in drafts:
        degree = draft.degree
        best, start = -1, float("inf")
        for first in range(0, n_devices - degree + 1, degree):
            ready = max(free[first : first + degree]) if degree > 1 else free[first]
            if ready < start:
                best, start = first, ready
        assert best >= 0, (degree, n_devices)
        placed.append(Placed(draft, best, start))
        free[best : best + degree] = [start + draft.seconds] * degree
    return placed


def makespan(placed: Sequence[Placed]) -> float:
    """End of the last job."""
    return max(job.end for job in placed)
