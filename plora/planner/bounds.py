"""How soon any plan can end: lower bounds from work, the longest trial, and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from plora.planner.costs import LARGEST_BUDGET, extra_seconds, smallest_budget, tail_seconds
from plora.planner.problem import Load, Problem

_MIXES = tuple(i / 8 for i in range(9))


@dataclass(frozen=True)
class Bounds:
    """Seconds before which no plan ends, by reason.

    Args:
        work: each trial's cheapest device-seconds, evenly over all devices.
        longest: the longest trial alone at its fastest degree.
        memory: rounds that memory (or ``max_adapters``) forces, each at the launch floor, mixed with work.
        rounds: as work, with the rounds that trials of many steps force on the devices they are spread over.
        whole: where only degree 1 is allowed, trials cannot be divided among devices.
    """

    work: float
    longest: float
    memory: float
    rounds: float
    whole: float

    @property
    def best(self) -> float:
        """The largest."""
        return max(vars(self).values())

    @property
    def reason(self) -> str:
        """Which of them it is."""
        return max(vars(self), key=lambda name: vars(self)[name])


class _Least(NamedTuple):
    """The least seconds a trial costs a device group of some degree, by part."""

    degree: int
    start: float
    linear: float  # its tokens and its adapter
    tokens: float  # microbatches of its tokens alone, at the largest budget it fits with
    shared: float  # a microbatch in each of its rounds, with tiles as full as the memory that adapters take
    microbatches: float  # a microbatch in each of its rounds, with tiles as full as it alone fills them
    optimizer: float
    floor: float  # all its rounds at the launch floor
    memory_share: float  # the least part of a job's memory it occupies
    per_step: float
    tail: float
    chain: float  # alone, start-up included


def lower_bounds(problem: Problem) -> Bounds:
    """Bounds on the makespan of ``problem`` under its cost models; the trials fit (:func:`check_fits`).

    A round of a job takes at least ``mix * floor + (1 - mix) * linear`` for any ``mix`` in [0, 1]. The linear part is a
    sum over the live trials; of the floor a trial bears at least the part of the memory (or of the places) it occupies,
    and of a microbatch that part or that of its tokens. So every mix gives each trial its least device-seconds at each
    degree, and their sum over the devices is a bound; every device that works also loads and starts once.
    """
    least = _least_costs(problem)
    start = min(option.start for options in least for option in options)
    places = 1 / (problem.max_adapters or len(problem.loads))

    def seconds(option: _Least, mix: float, *, by_memory: bool) -> float:
        share, microbatches = (option.memory_share, option.shared) if by_memory else (places, option.tokens)
        rounds = share * (mix * option.floor + option.per_step) + (1 - mix) * (option.linear + microbatches)
        return option.tail + option.optimizer + rounds

    def spread(mix: float, *, by_memory: bool) -> float:
        total = sum(
            min(option.degree * seconds(option, mix, by_memory=by_memory) for option in options) for options in least
        )
        return start + total / problem.n_devices

    whole = 0.0
    if problem.degrees == (1,) and problem.n_devices > 1:
        # Some device gets at least ceil(n / devices) trials: it takes no less than that many of the smallest.
        smallest = sorted(seconds(options[0], 0.0, by_memory=True) for options in least)
        whole = start + sum(smallest[: -(-len(smallest) // problem.n_devices)])
    return Bounds(
        work=spread(0.0, by_memory=True),
        longest=max(min(option.chain for option in options) for options in least),
        memory=max(spread(mix, by_memory=by_memory) for mix in _MIXES for by_memory in (True, False)),
        rounds=start + max(_rounds_bound(least, problem.n_devices, mix) for mix in _MIXES),
        whole=whole,
    )


def _rounds_bound(least: list[list[_Least]], n_devices: int, mix: float) -> float:
    """Seconds that each device works on average at least, rounds included that trials share.

    If none works longer than ``x``, trials of at least ``s`` steps, which take ``w(s)`` device-seconds by themselves,
    are on ``w(s) / x`` devices or more, each of which has ``s`` rounds or more. Added up over all ``s``, each trial
    bears the part of its rounds that its own seconds are of ``x``, whoever shares them. What these take and what trials
    take by themselves is at most ``x`` for each device: the least such ``x`` solves a quadratic equation.

    Args:
        least: per trial its least costs at each degree.
        n_devices: devices of the problem.
        mix: see :func:`lower_bounds`.
    """
    alone, shared = 0.0, 0.0
    for options in least:
        alone += min(each.degree * (each.tail + each.optimizer + (1 - mix) * each.linear) for each in options)
        own = min(each.degree * (each.tail + each.optimizer + each.linear) for each in options)
        shared += own * min(each.per_step + mix * each.floor + (1 - mix) * each.microbatches for each in options)
    return (alone + (alone**2 + 4 * n_devices * shared) ** 0.5) / (2 * n_devices)


def _least_costs(problem: Problem) -> list[list[_Least]]:
    """Per trial its least costs at each degree at which it fits; trials that are alike share them."""
    known: dict[tuple, list[_Least]] = {}
    budgets: dict[tuple, int] = {}
    for load in problem.loads:
        if load.kind in known:
            continue
        options = []
        for degree in problem.degrees:
            key = degree, load.rank, load.target_modules, load.longest
            if key not in budgets:
                budgets[key] = largest_budget(problem, degree, load.rank, load.target_modules, load.longest)
            if budgets[key]:
                options.append(_least(problem, load, degree, budgets[key]))
        assert options, "check_fits comes first"
        known[load.kind] = options
    return [known[load.kind] for load in problem.loads]


def _least(problem: Problem, load: Load, degree: int, tokens: int) -> _Least:
    step, memory = problem.time.cost(degree), problem.memory
    params = memory.adapter_params(load.rank, load.target_modules, degree)
    size = memory.adapter_bytes(load.rank, load.target_modules, degree)
    smallest = problem.token_budget or min(other.longest for other in problem.loads)
    room = memory.adapter_room(problem.free_bytes, smallest, load.rank, degree=degree, generation=problem.generation)
    extra = extra_seconds(step, load)
    share = size / room
    tiles = share * step.tiles(params / share)
    start = problem.load_seconds + step.start
    alone = step.round_of(
        load.tokens_per_step,
        extra,
        1,
        params,
        max(1, -(-int(load.tokens_per_step) // tokens)),
    )
    tail = tail_seconds(step, load, params)
    return _Least(
        degree=degree,
        start=start,
        linear=load.steps * (load.tokens_per_step * step.per_token + extra + step.per_adapter),
        tokens=load.steps * load.tokens_per_step / tokens * step.per_microbatch,
        shared=load.steps * (share * step.per_microbatch + tiles * step.per_tile),
        microbatches=load.steps * (step.per_microbatch + step.tiles(params) * step.per_tile),
        optimizer=load.steps * params * step.per_param,
        floor=load.steps * step.floor,
        memory_share=share,
        per_step=load.steps * step.per_step,
        tail=tail,
        chain=start + load.steps * alone + tail,
    )


def largest_budget(
    problem: Problem, degree: int, rank: int, target_modules: str | tuple[str, ...], longest: int
) -> int:
    """The largest token budget beside which such an adapter fits alone; 0 if not even its longest sequence fits."""
    size = problem.memory.adapter_bytes(rank, target_modules, degree)

    def fits(tokens: int) -> bool:
        room = problem.memory.adapter_room(
            problem.free_bytes, tokens, rank, degree=degree, generation=problem.generation
        )
        return room >= size

    if problem.token_budget is not None:
        return problem.token_budget if fits(problem.token_budget) else 0
    if not fits(longest):
        return 0
    low, high = longest, max(smallest_budget(longest), LARGEST_BUDGET)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
