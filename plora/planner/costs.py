"""Bytes and seconds of loads at one degree and token budget, tabulated: what planners and the simulator add up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from plora.planner.problem import Load, Problem
from plora.profiler.time import StepCost

# Microbatches beyond this gain nothing on any device.
LARGEST_BUDGET = 1 << 16
# Rows that generate together, as a rule.
ROWS_AT_A_TIME = 64
_SIZES = tuple(1 << i for i in range(8, 17))
# CUDA graphs that serve ragged microbatches of about one size, within half an octave.
_GRAPHS_PER_SIZE = 3


class Segment(NamedTuple):
    """Rounds ``[first, last)`` in which the same loads are alive, and what each of these rounds takes."""

    first: int
    last: int
    live: tuple[int, ...]
    round_seconds: float


@dataclass(frozen=True, eq=False)
class Costs:
    """The loads of a problem on a device group of ``degree``, with microbatches of ``tokens``. Lists are per load.

    Args:
        problem: the loads and limits.
        degree: tensor-parallel degree.
        tokens: token budget of a microbatch.
        step: the time model at this degree.
        room: bytes for adapters on each device beside the base and one microbatch; may be negative.
        max_live: adapters that may be alive at a time, memory aside.
        steps: optimizer steps.
        step_tokens: tokens of a step.
        step_extra: seconds of a step's tokens beside their number: rank, labels, attention.
        size: bytes of the adapter on a device.
        params: parameters of the adapter on a device.
        tail: seconds of evaluation and saving.
        linear: seconds of its tokens and its adapter in rounds that are not at the launch floor.
        work: the same with the optimizer and ``tail``: what it adds to such a job.
        eligible: whether the load can be alone in a job here.
    """

    problem: Problem
    degree: int
    tokens: int
    step: StepCost
    room: int
    max_live: int
    steps: list[int]
    step_tokens: list[float]
    step_extra: list[float]
    size: list[int]
    params: list[int]
    tail: list[float]
    linear: list[float]
    work: list[float]
    eligible: list[bool]

    @property
    def start(self) -> float:
        """Seconds before a job's first round."""
        return self.step.start

    def fits(self, live: Sequence[int]) -> bool:
        """Whether these loads can be alive together."""
        return (
            len(live) <= self.max_live
            and all(self.eligible[k] for k in live)
            and sum(self.size[k] for k in live) <= self.room
        )

    def round_seconds(self, live: Sequence[int]) -> float:
        """Seconds of a round in which each of these loads contributes a batch."""
        return self.round_of_sums(
            sum(self.step_tokens[k] for k in live),
            sum(self.step_extra[k] for k in live),
            len(live),
            sum(self.params[k] for k in live),
        )

    def round_of_sums(self, tokens: float, extra: float, adapters: int, params: float) -> float:
        """The same from sums over the live loads; no time without any."""
        if adapters == 0:
            return 0.0
        microbatches = max(1, math.ceil(tokens / self.tokens - 1e-9))
        return self.step.round_of(tokens, extra, adapters, params, microbatches)

    def chain_seconds(self, k: int) -> float:
        """Seconds of a load that runs alone, its evaluation and saving included, start-up left out."""
        return self.steps[k] * self.round_seconds((k,)) + self.tail[k]

    def segments(self, members: Sequence[int], starts: Sequence[int]) -> list[Segment]:
        """The rounds of a job in which load ``members[i]`` joins at round ``starts[i]``; idle rounds take no time."""
        ends = [start + self.steps[k] for k, start in zip(members, starts, strict=True)]
        marks = sorted({*starts, *ends})
        spans = list(zip(members, starts, ends, strict=True))
        segments = []
        for first, last in itertools.pairwise(marks):
            live = tuple(k for k, start, end in spans if start <= first < end)
            segments.append(Segment(first, last, live, self.round_seconds(live)))
        return segments

    def seconds(self, members: Sequence[int], starts: Sequence[int] | None = None) -> float:
        """Seconds that a job trains, evaluates and saves, its start-up left out. ``starts`` defaults to all at once."""
        if starts is None:
            starts = [0] * len(members)
        segments = self.segments(members, starts)
        rounds = sum((s.last - s.first) * s.round_seconds for s in segments)
        graphs = self.graph_seconds(sum(self.step_tokens[k] for k in s.live) for s in segments)
        return rounds + graphs + sum(self.tail[k] for k in members)

    def graph_seconds(self, sizes: Iterable[float]) -> float:
        """Seconds of making CUDA graphs in a job that has rounds of so many tokens: similar ones share theirs."""
        if not self.step.per_graph:
            return 0.0
        evenly = (tokens / max(1, math.ceil(tokens / self.tokens - 1e-9)) for tokens in sizes)
        levels = {round(2 * math.log2(tokens)) for tokens in evenly if 1 <= tokens <= self.problem.memory.graph_tokens}
        return len(levels) * _GRAPHS_PER_SIZE * self.step.per_graph

    def largest_microbatch(self, members: Sequence[int], starts: Sequence[int]) -> int:
        """Tokens of the largest microbatch that a job is likely to see: rounds are cut evenly, between sequences.

        Batches vary: more than three standard deviations from the mean are rare.
        """
        largest = 0.0
        for segment in self.segments(members, starts):
            live = [self.problem.loads[k] for k in segment.live]
            mean, spread = sum(load.tokens_per_step for load in live), sum(load.spread**2 for load in live) ** 0.5
            longest = max((load.longest for load in live), default=0)
            largest = max(largest, self._even_part(mean - 3 * spread, mean + 3 * spread, longest))
        return max(1, min(self.tokens, math.ceil(largest)))

    def _even_part(self, least: float, most: float, longest: int) -> float:
        """Tokens of the largest microbatch of rounds that have from ``least`` to ``most`` tokens."""
        if most <= self.tokens:
            return most
        if most // self.tokens * self.tokens >= least:
            return self.tokens  # some rounds fill theirs
        return most / math.ceil(most / self.tokens) + longest / 2

    def peak_size(self, members: Sequence[int], starts: Sequence[int]) -> int:
        """Most bytes of adapters alive at a time."""
        return max(sum(self.size[k] for k in segment.live) for segment in self.segments(members, starts))


def make_costs(problem: Problem, degree: int, tokens: int, max_rank: int | None = None) -> Costs:
    """Tabulate a problem's loads at a degree and token budget; loads above ``max_rank`` are not eligible."""
    memory, step, loads = problem.memory, problem.time.cost(degree), problem.loads
    max_rank = max_rank or max(load.rank for load in loads)
    room = memory.adapter_room(problem.free_bytes, tokens, max_rank, degree=degree, generation=problem.generation)
    size = [memory.adapter_bytes(load.rank, load.target_modules, degree) for load in loads]
    params = [memory.adapter_params(load.rank, load.target_modules, degree) for load in loads]
    tail = [tail_seconds(step, load, count) for load, count in zip(loads, params, strict=True)]
    extra = [extra_seconds(step, load) for load in loads]
    per_token = step.per_token + step.per_microbatch / tokens
    linear = [
        load.steps * (load.tokens_per_step * per_token + more + step.per_adapter)
        for load, more in zip(loads, extra, strict=True)
    ]
    return Costs(
        problem=problem,
        degree=degree,
        tokens=tokens,
        step=step,
        room=room,
        max_live=problem.max_adapters or len(loads),
        steps=[load.steps for load in loads],
        step_tokens=[load.tokens_per_step for load in loads],
        step_extra=extra,
        size=size,
        params=params,
        tail=tail,
        linear=linear,
        work=[
            seconds + load.steps * count * step.per_param + after
            for load, seconds, count, after in zip(loads, linear, params, tail, strict=True)
        ],
        eligible=[
            load.longest <= tokens and load.rank <= max_rank and bytes_ <= room
            for load, bytes_ in zip(loads, size, strict=True)
        ],
    )


def extra_seconds(step: StepCost, load: Load) -> float:
    """Seconds of a step of a load beside those of its tokens' number."""
    return step.extra_seconds(load.token_rank, load.labels, load.squares_per_step, load.sequences_per_step)


def tail_seconds(step: StepCost, load: Load, params: int) -> float:
    """Seconds of evaluating, generating for and saving a load over its whole training."""
    labels = load.eval_tokens * load.labels / load.tokens_per_step
    generated = load.generated_tokens * (step.per_generated_token + step.per_decode_step / ROWS_AT_A_TIME)
    return step.eval_seconds(load.eval_tokens, labels) + generated + step.save_seconds(params)


def smallest_budget(longest: int) -> int:
    """The least token budget worth trying beside a sequence of so many tokens."""
    return max(128, -(-longest // 128) * 128)


def budget_choices(problem: Problem, degree: int) -> list[int]:
    """Token budgets at a degree, ascending: powers of two from the longest sequence up to what leaves room for the
    largest adapter; the given budget alone where there is one. Empty if nothing fits.
    """
    if problem.token_budget is not None:
        choices = [problem.token_budget]
    else:
        least = smallest_budget(problem.longest)
        # Beyond a round of all trials together, a larger microbatch is never filled.
        most = sum(load.tokens_per_step for load in problem.loads)
        choices = [least, *(size for size in _SIZES if least < size < 2 * most)]
    largest = max(problem.memory.adapter_bytes(x.rank, x.target_modules, degree) for x in problem.loads)
    max_rank = max(load.rank for load in problem.loads)

    def room(tokens: int) -> int:
        return problem.memory.adapter_room(
            problem.free_bytes, tokens, max_rank, degree=degree, generation=problem.generation
        )

    fitting = [tokens for tokens in choices if room(tokens) >= largest]
    # The longest sequence exactly, where rounding it up to a multiple of 128 is what does not fit.
    if not fitting and problem.token_budget is None and room(problem.longest) >= largest:
        fitting = [problem.longest]
    return fitting


def tabulate(problem: Problem) -> dict[int, list[Costs]]:
    """The tables worth planning with, by degree; a degree at which nothing fits is left out.

    For each degree at most three budgets: the smallest, and the smallest whose time per token is within 3% and 0.25% of
    the best (a larger microbatch only costs memory). A load that fits none of them, because the longest sequence
    belongs to one trial and the largest adapter to another, adds a table for sequences and ranks up to its own.
    """
    tables: dict[int, list[Costs]] = {}
    for degree in problem.degrees:
        budgets = budget_choices(problem, degree)
        step = problem.time.cost(degree)
        kept = sorted({*budgets[:1], *(_knee(step, budgets, slack) for slack in (0.03, 0.0025) if budgets)})
        costs = [make_costs(problem, degree, tokens) for tokens in kept]
        for k in sorted(range(len(problem.loads)), key=lambda k: (-problem.loads[k].longest, -problem.loads[k].rank)):
            if not any(table.eligible[k] for table in costs):
                own = _own_table(problem, degree, k)
                if own is not None:
                    costs.append(own)
        if costs:
            tables[degree] = costs
    return tables


def _own_table(problem: Problem, degree: int, k: int) -> Costs | None:
    """A table in which load ``k`` fits alone, with the largest budget that allows it; None if it never fits."""
    load = problem.loads[k]
    if problem.token_budget is not None:
        choices = [problem.token_budget]
    else:
        choices = [load.longest, *(size for size in _SIZES if size > load.longest)]
    step = problem.time.cost(degree)
    fitting = []
    for tokens in choices:
        room = problem.memory.adapter_room(
            problem.free_bytes, tokens, load.rank, degree=degree, generation=problem.generation
        )
        if room >= problem.memory.adapter_bytes(load.rank, load.target_modules, degree):
            fitting.append(tokens)
    return make_costs(problem, degree, _knee(step, fitting, 0.01), load.rank) if fitting else None


def _knee(step: StepCost, budgets: Sequence[int], slack: float) -> int:
    def per_token(tokens: int) -> float:
        return max(step.floor / tokens, step.full_microbatch / tokens + step.per_token + step.per_label)

    best = min(per_token(tokens) for tokens in budgets)
    return next(tokens for tokens in budgets if per_token(tokens) <= (1 + slack) * best)
