"""PLoRA's decomposition (DTM): which degrees the free devices are cut into, and which pack each group gets.

With ``g`` devices left, each degree ``d`` up to the largest power of two in ``g`` is tried: F(d, K) gives its pack, the
rest of the devices and trials is decomposed alike, and the best sum of throughputs is kept (arXiv 2508.02932).
Groups of one decomposition start together, so only falling degrees are tried: their order makes no difference.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from plora.planner.ilp import Packed, best_pack
from plora.planner.jobs import Workshop


@dataclass(frozen=True)
class Choice:
    """A decomposition: degree and members of each job, and the sum of their throughputs."""

    jobs: tuple[tuple[int, tuple[int, ...]], ...]
    throughput: float


class Decomposer:
    """Decomposes and remembers what it solved.

    Args:
        workshop: the problem's tables.
        solver: solver's name, or None for greedy packs.
        time_limit: seconds for one F(d, K).
        max_solves: how many F(d, K) may be solved; then packs are greedy and one degree is tried at a time.
        deadline: of ``time.monotonic``; the same from then on.
    """

    def __init__(
        self, workshop: Workshop, solver: str | None, time_limit: float, max_solves: int, deadline: float
    ) -> None:
        self.workshop = workshop
        self.solver = solver
        self.time_limit = time_limit
        self.deadline = deadline
        self.solves_left = max_solves
        self._choices: dict[tuple, Choice] = {}
        self._packs: dict[tuple, Packed | None] = {}

    def decompose(self, devices: int, remaining: Sequence[int]) -> Choice:
        """The best jobs to start now on so many free devices; none if no remaining trial fits on them."""
        return self._best(devices, max(self.workshop.degrees), frozenset(remaining))

    def _best(self, devices: int, largest: int, remaining: frozenset[int]) -> Choice:
        if not remaining or devices == 0:
            return Choice((), 0.0)
        key = devices, largest, remaining
        if key in self._choices:
            return self._choices[key]
        best = Choice((), 0.0)
        degrees = [d for d in self.workshop.degrees if d <= min(devices, largest)]
        for degree in reversed(degrees):
            if best.jobs and self.solves_left <= 0 and degree != degrees[0]:
                continue
            pack = self._pack(degree, devices, remaining)
            if pack is None:
                continue
            rest = self._best(devices - degree, degree, remaining - set(pack.members))
            throughput = pack.throughput + rest.throughput
            if throughput > best.throughput * (1 + 1e-9):
                best = Choice(((degree, pack.members), *rest.jobs), throughput)
        self._choices[key] = best
        return best

    def _pack(self, degree: int, devices: int, remaining: frozenset[int]) -> Packed | None:
        groups = devices // degree
        key = degree, groups, remaining
        if key not in self._packs:
            work = sum(w for k in remaining if (w := self.workshop.work(degree, k)) < float("inf"))
            if time.monotonic() > self.deadline:
                self.solves_left = 0
            exhausted = self.solves_left <= 0
            self.solves_left -= 1
            self._packs[key] = best_pack(
                self.workshop,
                degree,
                sorted(remaining),
                work / groups,
                solver=None if exhausted else self.solver,
                time_limit=self.time_limit,
            )
        return self._packs[key]
