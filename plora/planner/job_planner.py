"""PLoRA's job planner: whenever devices are free, decompose them, start the jobs, go to the next completion."""

from __future__ import annotations

import heapq

from plora.planner.dtm import Decomposer
from plora.planner.jobs import Draft, Placed, Workshop


def plan_jobs(
    workshop: Workshop,
    *,
    solver: str | None,
    deadline: float = float("inf"),
    time_limit: float = 1.0,
    max_solves: int = 24,
) -> list[Placed] | None:
    """Plan jobs that each run their pack to its end.

    Args:
        workshop: the problem's tables.
        solver: solver's name, or None for greedy packs.
        deadline: of ``time.monotonic``; packs are made greedily after it.
        time_limit: seconds for one integer program.
        max_solves: programs after which packs are made greedily.

    Returns:
        The jobs on their devices, or None if trials are left that fit on no aligned group of free devices.
    """
    decomposer = Decomposer(workshop, solver, time_limit, max_solves, deadline)
    devices = _Devices(workshop.problem.n_devices)
    remaining = set(range(len(workshop.problem.loads)))
    running: list[tuple[float, int, int]] = []  # (end, first device, degree)
    placed: list[Placed] = []
    now = workshop.problem.load_seconds
    while remaining:
        for degree, members in decomposer.decompose(devices.free, sorted(remaining)).jobs:
            first = devices.take(degree)
            if first is None:
                continue
            draft: Draft | None = workshop.draft(degree, frozenset(members))
            assert draft is not None, "F(d, K) takes loads that share a table"
            placed.append(Placed(draft, first, now))
            heapq.heappush(running, (now + draft.seconds, first, degree))
            remaining -= set(members)
        if not remaining:
            break
        if not running:
            return None
        now, first, degree = heapq.heappop(running)
        devices.give(first, degree)
        while running and running[0][0] <= now:
            _, first, degree = heapq.heappop(running)
            devices.give(first, degree)
    return placed


class _Devices:
    """Which devices are free; groups are aligned to their size, as device links are."""

    def __init__(self, count: int) -> None:
        self._free = [True] * count

    @property
    def free(self) -> int:
        return sum(self._free)

    def take(self, degree: int) -> int | None:
        for first in range(0, len(self._free) - degree + 1, degree):
            if all(self._free[first : first + degree]):
                self._free[first : first + degree] = [False] * degree
                return first
        return None

    def give(self, first: int, degree: int) -> None:
        self._free[first : first + degree] = [True] * degree
