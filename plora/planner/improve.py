"""Local search over plans: move, swap, merge, split and re-cut jobs while the makespan falls.

A plan is an ordered list of jobs, each placed on the device group that is free first, so the search covers long-lived
groups, jobs one after another, and a tail of jobs of higher degree alike. It is deterministic for a seed: it counts
evaluations, not seconds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from plora.planner.jobs import Draft, Placed, Workshop, makespan, place

# Late acceptance: a step is taken if it is no worse than the plan this many steps ago.
MEMORY = 30
# Evaluations without a gain after which the search gives up, as a rule.
PATIENCE = 1500
Job = tuple[int, frozenset[int]]


class Improver:
    """Improves a list of drafts.

    Args:
        workshop: makes the jobs.
        bound: a lower bound on the makespan, in seconds.
        seed: of the random moves.
        target: stop once the makespan is within this relative gap of the bound.
        patience: evaluations without a gain after which it gives up.
    """

    def __init__(
        self, workshop: Workshop, bound: float, seed: int, target: float = 0.002, patience: int = PATIENCE
    ) -> None:
        self.workshop, self.patience = workshop, patience
        self.enough = bound * (1 + target)
        self.random = random.Random(seed)

    def run(self, drafts: Sequence[Draft], evaluations: int, deadline: float) -> list[Draft]:
        """The best plan seen in so many evaluations, or until ``deadline`` (of ``time.monotonic``)."""
        n_devices = self.workshop.problem.n_devices
        current = list(drafts)
        placed = place(current, n_devices)
        score = best_score = self._score(placed)
        best = current
        history = [score] * MEMORY
        gained = 0
        for step in range(evaluations):
            if best_score[0] <= self.enough or step - gained > self.patience or time.monotonic() > deadline:
                break
            changed = self._move(current, placed)
            if changed is None:
                continue
            changed_placed = place(changed, n_devices)
            changed_score = self._score(changed_placed)
            if changed_score <= max(score, history[step % MEMORY]):
                current, placed, score = changed, changed_placed, changed_score
                if score < best_score:
                    if score[0] < best_score[0] * (1 - 1e-5):
                        gained = step
                    best, best_score = current, score
            history[step % MEMORY] = score
        return best

    def shake(self, drafts: Sequence[Draft], moves: int) -> list[Draft]:
        """A plan some random moves away, whatever they cost: where to search next once a search is stuck."""
        current = list(drafts)
        for _ in range(moves):
            placed = place(current, self.workshop.problem.n_devices)
            current = self._move(current, placed) or current
        return current

    def _score(self, placed: Sequence[Placed]) -> tuple[float, float]:
        end = makespan(placed)
        # Among plans of one makespan prefer those with fewer devices busy to the end: the next move has room.
        return end, sum((job.end / end) ** 8 * job.draft.degree for job in placed)

    def _move(self, drafts: list[Draft], placed: Sequence[Placed]) -> list[Draft] | None:
        critical = self._critical(placed)
        roll = self.random.random()
        if roll < 0.40:
            jobs = self._shift(drafts, critical)
        elif roll < 0.70:
            jobs = self._swap(drafts, critical)
        elif roll < 0.80:
            jobs = self._change_degree(drafts, critical)
        elif roll < 0.87:
            jobs = self._merge(drafts, critical)
        elif roll < 0.94:
            jobs = self._split(drafts, critical)
        else:
            return self._reorder(drafts)
        return self._build(drafts, jobs)

    def _critical(self, placed: Sequence[Placed]) -> int:
        """A job that ends last, or one that runs on its devices before it."""
        last = max(range(len(placed)), key=lambda i: placed[i].end)
        devices = range(placed[last].first_device, placed[last].first_device + placed[last].draft.degree)
        chain = [
            i
            for i, job in enumerate(placed)
            if job.first_device < devices.stop and devices.start < job.first_device + job.draft.degree
        ]
        return last if self.random.random() < 0.6 else self.random.choice(chain)

    def _shift(self, drafts: list[Draft], source: int) -> list[Job]:
        jobs = [(draft.degree, frozenset(draft.members)) for draft in drafts]
        k = self.random.choice(drafts[source].members)
        jobs[source] = (jobs[source][0], jobs[source][1] - {k})
        target = self._target(drafts)
        if target == len(jobs):
            jobs.append((self.random.choice(self.workshop.degrees), frozenset({k})))
        else:
            jobs[target] = (jobs[target][0], jobs[target][1] | {k})
        return jobs

    def _target(self, drafts: list[Draft]) -> int:
        """A job to give to, the shorter of two as a rule; the number of jobs stands for a new one."""
        if self.random.random() < 0.05:
            return len(drafts)
        one, two = self.random.randrange(len(drafts)), self.random.randrange(len(drafts))
        return min(one, two, key=lambda i: drafts[i].seconds)

    def _swap(self, drafts: list[Draft], source: int) -> list[Job]:
        jobs = [(draft.degree, frozenset(draft.members)) for draft in drafts]
        target = self._target(drafts) % len(drafts)
        k, other = self.random.choice(drafts[source].members), self.random.choice(drafts[target].members)
        if target == source or self.workshop.problem.loads[k].kind == self.workshop.problem.loads[other].kind:
            return []
        jobs[source] = (jobs[source][0], jobs[source][1] - {k} | {other})
        jobs[target] = (jobs[target][0], jobs[target][1] - {other} | {k})
        return jobs

    def _change_degree(self, drafts: list[Draft], source: int) -> list[Job]:
        jobs = [(draft.degree, frozenset(draft.members)) for draft in drafts]
        jobs[source] = (self.random.choice(self.workshop.degrees), jobs[source][1])
        return jobs

    def _merge(self, drafts: list[Draft], source: int) -> list[Job]:
        jobs = [(draft.degree, frozenset(draft.members)) for draft in drafts]
        target = self.random.randrange(len(jobs))
        if target == source:
            return []
        jobs[target] = (self.random.choice((jobs[target][0], jobs[source][0])), jobs[target][1] | jobs[source][1])
        del jobs[source]
        return jobs

    def _split(self, drafts: list[Draft], source: int) -> list[Job]:
        jobs = [(draft.degree, frozenset(draft.members)) for draft in drafts]
        members = list(drafts[source].members)
        if len(members) < 2:
            return []
        self.random.shuffle(members)
        cut = self.random.randrange(1, len(members))
        degrees = self.workshop.degrees
        jobs[source] = (self.random.choice(degrees), frozenset(members[:cut]))
        jobs.append((self.random.choice(degrees), frozenset(members[cut:])))
        return jobs

    def _reorder(self, drafts: list[Draft]) -> list[Draft] | None:
        if len(drafts) < 2:
            return None
        changed = list(drafts)
        changed.insert(self.random.randrange(len(drafts)), changed.pop(self.random.randrange(len(drafts))))
        return changed

    def _build(self, drafts: list[Draft], jobs: list[Job]) -> list[Draft] | None:
        """Drafts of the changed jobs; None if nothing changed, or a job does not fit or is alone too long."""
        built = []
        for degree, members in jobs:
            if not members:
                continue
            draft = self.workshop.draft(degree, members)
            if draft is None:
                return None
            built.append(draft)
        return built or None
