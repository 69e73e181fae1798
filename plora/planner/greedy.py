"""The answer that is always at hand: longest trials first onto equal device groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from plora.planner.jobs import Draft, Workshop, makespan, place

Partition = tuple[int, ...]  # degrees of the device groups, falling


def greedy(workshop: Workshop) -> list[Draft]:
    """For each degree, cut the devices into groups of it and deal the trials out; the best degree wins.

    Trials that fit only at a higher degree are dealt to groups of the least degree at which they fit, which run
    after or beside the others.
    """
    best: tuple[float, list[Draft]] | None = None
    for degree in workshop.degrees:
        groups = workshop.problem.n_devices // degree
        inside = [k for k in range(len(workshop.problem.loads)) if workshop.table(degree, k)]
        drafts = deal(workshop, [degree] * groups, inside) if inside else []
        drafts += _leftovers(workshop, set(range(len(workshop.problem.loads))) - set(inside))
        end = makespan(place(drafts, workshop.problem.n_devices))
        if best is None or end < best[0]:
            best = end, drafts
    assert best is not None
    return best[1]


def _leftovers(workshop: Workshop, rest: set[int]) -> list[Draft]:
    drafts: list[Draft] = []
    for degree in workshop.degrees:
        fitting = [k for k in sorted(rest) if workshop.table(degree, k)]
        if fitting:
            drafts += deal(workshop, [degree] * (workshop.problem.n_devices // degree), fitting)
            rest -= set(fitting)
    return drafts


@dataclass
class _Group:
    """A device group being filled: what its members add up to, and which tables still take all of them."""

    degree: int
    start: float
    tables: frozenset[int]
    members: list[int] = field(default_factory=list)
    work: float = 0.0
    chain: float = 0.0
    excess: float = 0.0  # seconds above the launch floor, of all members
    chain_excess: float = 0.0  # of the member with the longest chain


def deal(workshop: Workshop, partition: Sequence[int], loads: Sequence[int]) -> list[Draft]:
    """Longest processing time first: each trial to the group that would end first with it.

    A group's end is estimated as the larger of its members' work and its longest chain plus what the other members'
    rounds take above the launch floor. Trials that no group can take make jobs of their own at the least degree.
    """
    groups = []
    for degree in partition:
        tables = workshop.tables[degree]
        groups.append(_Group(degree, tables[0].start, frozenset(range(len(tables)))))
    alone = []
    for k in _longest_first(loads, workshop, sorted(set(partition))):
        ends = [_end_with(workshop, group, k) for group in groups]
        best = min(range(len(groups)), key=ends.__getitem__)
        if ends[best] == float("inf"):
            alone.append(k)
        else:
            _add(workshop, groups[best], k)
    jobs = [(group.degree, frozenset(group.members)) for group in groups if group.members]
    jobs += [(next(d for d in workshop.degrees if workshop.table(d, k)), frozenset({k})) for k in alone]
    drafts = [workshop.draft(degree, members) for degree, members in jobs]
    return [draft for draft in drafts if draft is not None]


def _end_with(workshop: Workshop, group: _Group, k: int) -> float:
    if not group.tables & workshop.tables_of(group.degree, k):
        return float("inf")
    chain, excess = workshop.chain(group.degree, k) - group.start, workshop.excess(group.degree, k)
    other = group.chain - group.chain_excess + excess
    chained = group.excess + (chain if chain > group.chain else other)
    return group.start + max(group.work + workshop.work(group.degree, k), chained)


def _add(workshop: Workshop, group: _Group, k: int) -> None:
    chain, excess = workshop.chain(group.degree, k) - group.start, workshop.excess(group.degree, k)
    if chain > group.chain:
        group.chain, group.chain_excess = chain, excess
    group.tables &= workshop.tables_of(group.degree, k)
    group.members.append(k)
    group.work += workshop.work(group.degree, k)
    group.excess += excess


def _longest_first(loads: Sequence[int], workshop: Workshop, degrees: Sequence[int]) -> list[int]:
    """Chains that could outlast a device's share of the work first; the rest in order of falling work."""
    work = {k: min(workshop.work(degree, k) for degree in degrees) for k in loads}
    chain = {k: min(workshop.chain(degree, k) for degree in degrees) for k in loads}
    share = sum(x for x in work.values() if x < float("inf")) * min(degrees) / workshop.problem.n_devices
    return sorted(loads, key=lambda k: (-chain[k] if chain[k] > 0.5 * share else 0.0, -work[k], k))
