"""Device groups that live for the whole sweep: ways to cut the devices, trials dealt out to each.

Where the time model is close to linear in tokens, a job that refills never idles and has no short last job of its own,
so a few long-lived groups come closer to the bound than many jobs that run their packs to the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from plora.planner.greedy import deal
from plora.planner.jobs import Draft, Workshop, makespan, place

# Up to this many devices every partition into powers of two is tried (36 of 16 devices), above it mixtures of two.
ALL_PARTITIONS = 16


def partitions(n_devices: int, degrees: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Ways to cut devices into groups of the given degrees, each as falling degrees; what no degree fills idles."""
    if n_devices <= ALL_PARTITIONS:
        yield from _all_partitions(n_devices, sorted(degrees, reverse=True))
        return
    for low in sorted(degrees):
        yield (low,) * (n_devices // low)
        for high in sorted(d for d in degrees if low < d):
            count = 1
            while count * high < n_devices:
                yield (high,) * count + (low,) * ((n_devices - count * high) // low)
                count *= 2


def _all_partitions(n_devices: int, degrees: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if not degrees:
        yield ()
        return
    high, rest = degrees[0], degrees[1:]
    if not rest:
        yield (high,) * (n_devices // high)
        return
    for count in range(n_devices // high, -1, -1):
        for tail in _all_partitions(n_devices - count * high, rest):
            if count or tail:
                yield (high,) * count + tail


def long_lived_groups(workshop: Workshop, keep: int = 4) -> list[list[Draft]]:
    """The ``keep`` best plans of long-lived groups, best first; empty if no partition takes every trial."""
    loads = range(len(workshop.problem.loads))
    n_devices = workshop.problem.n_devices
    estimates = sorted(
        (estimate, partition)
        for partition in set(partitions(n_devices, workshop.degrees))
        if (estimate := _fluid(workshop, partition)) < float("inf")
    )
    plans: list[tuple[float, int, list[Draft]]] = []
    for _, partition in estimates[: 4 * keep]:
        drafts = deal(workshop, partition, loads)
        plans.append((makespan(place(drafts, n_devices)), len(plans), drafts))
    return [drafts for _, _, drafts in sorted(plans)[:keep]]


def _fluid(workshop: Workshop, partition: Sequence[int]) -> float:
    """A quick estimate: trials as a fluid shared by the groups in proportion, and the longest of them."""
    degrees = sorted(set(partition))
    counts = {degree: partition.count(degree) for degree in degrees}
    loads = range(len(workshop.problem.loads))
    longest, rate_work = 0.0, 0.0
    start = min(workshop.tables[degree][0].start for degree in degrees)
    for k in loads:
        works = {degree: workshop.work(degree, k) for degree in degrees}
        rate = sum(counts[degree] / work for degree, work in works.items() if work < float("inf"))
        if rate == 0:
            return float("inf")
        rate_work += 1 / rate
        longest = max(longest, min(workshop.chain(degree, k) for degree in degrees))
    return max(longest, start + rate_work)
