"""What is to be planned: trials as loads, the devices, the limits; and what fits where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from plora.modules.config import ALL_LINEAR, computed_rank
from plora.profiler.memory import MemoryModel, MemoryParts, format_bytes, targeted
from plora.profiler.time import TimeModel

if TYPE_CHECKING:
    from plora.models.spec import ModelSpec
    from plora.search.trial import Trial

OBJECTIVES = ("makespan", "rank_throughput")
# No training is this long, and much larger numbers overflow.
MOST_STEPS = 10**12


@dataclass(frozen=True)
class Load:
    """A trial as the planner sees it: what it occupies, and for how long.

    Args:
        name: the trial's name, unique in a problem.
        rank: rank of its adapter.
        steps: optimizer steps; it takes part in as many rounds.
        tokens_per_step: tokens of one of its batches, on average.
        longest: tokens of its longest sequence, which a microbatch must hold whole.
        target_modules: linear layers it adapts.
        eval_tokens: tokens it is evaluated on in all, forward pass alone.
        generated_tokens: tokens it generates for its metric in all.
        labels_per_step: labelled tokens of one of its batches, on average; None where all of them are.
        squares_per_step: squared lengths of the sequences of one of its batches, summed, on average.
        sequences_per_step: how many of them.
        spread: standard deviation of the tokens of one of its batches.
    """

    name: str
    rank: int
    steps: int
    tokens_per_step: float
    longest: int
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    eval_tokens: int = 0
    generated_tokens: int = 0
    labels_per_step: float | None = None
    squares_per_step: float = 0.0
    sequences_per_step: float = 0.0
    spread: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.steps < 1 or self.tokens_per_step <= 0 or self.longest < 1:
            raise ValueError(
                f"trial {self.name}: rank, steps and tokens must be positive, got rank {self.rank}, "
                f"{self.steps} steps, {self.tokens_per_step} tokens per step, longest sequence {self.longest}"
            )
        if self.steps > MOST_STEPS:
            raise ValueError(f"trial {self.name} has more than {MOST_STEPS:.0e} steps: lower its epochs or max_steps")

    @property
    def token_rank(self) -> float:
        """Tokens of one of its batches times the rank that they are computed at."""
        return self.tokens_per_step * computed_rank(self.rank)

    @property
    def labels(self) -> float:
        """Labelled tokens of one of its batches, on average."""
        return self.tokens_per_step if self.labels_per_step is None else self.labels_per_step

    @property
    def kind(self) -> tuple:
        """Equal for trials that the planner need not tell apart."""
        return (
            self.rank, self.steps, self.tokens_per_step, self.longest,
            self.target_modules, self.eval_tokens, self.generated_tokens, self.labels, self.squares_per_step,
            self.sequences_per_step, self.spread,
        )  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Loads, devices and limits.

    Args:
        loads: the trials, names unique.
        memory: the memory model.
        time: the time model; it has every degree of ``degrees``.
        free_bytes: bytes free on each device.
        n_devices: devices, all alike.
        degrees: tensor-parallel degrees that a job may have, ascending.
        token_budget: tokens of a microbatch; None lets the planner choose.
        max_adapters: adapters alive in a job at a time; None for what fits.
        generation: rows and length of packed generation, ``(0, 0)`` for none.
        objective: ``makespan``, or ``rank_throughput`` as in PLoRA.
        is_loaded: whether the base is on the device already, compiled.

    Raises:
        ValueError: for an empty problem, doubled names or contradictory limits.
    """

    loads: tuple[Load, ...]
    memory: MemoryModel
    time: TimeModel
    free_bytes: int
    n_devices: int = 1
    degrees: tuple[int, ...] = (1,)
    token_budget: int | None = None
    max_adapters: int | None = None
    generation: tuple[int, int] = (0, 0)
    objective: str = "makespan"
    is_loaded: bool = False

    def __post_init__(self) -> None:
        if not self.loads:
            raise ValueError("nothing to plan: there are no trials")
        names = [load.name for load in self.loads]
        doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if doubled:
            raise ValueError(f"trial names must be unique, these occur more than once: {', '.join(doubled)}")
        if self.n_devices < 1:
            raise ValueError(f"at least one device is needed to train on, got {self.n_devices}")
        if self.max_adapters is not None and self.max_adapters < 1:
            raise ValueError(f"max_adapters must be at least 1, got {self.max_adapters}")
        if self.token_budget is not None and self.token_budget < self.longest:
            raise ValueError(
                f"microbatches have {self.token_budget} tokens (packing.tokens_per_microbatch), but the longest "
                f"sequence has {self.longest} and must fit one whole: raise that, or lower max_seq_len"
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        self._check_degrees()

    def _check_degrees(self) -> None:
        spec = self.memory.spec
        if not self.degrees:
            raise ValueError("no tensor-parallel degree is allowed: give at least degree 1")
        for degree in self.degrees:
            if degree not in legal_degrees(spec, max(degree, 1)):
                raise ValueError(
                    f"tensor-parallel degree {degree} does not suit {spec.name}: it must be a power of two that "
                    f"divides its {spec.num_heads} heads and {spec.num_kv_heads} key-value heads"
                )
            if degree > self.n_devices:
                raise ValueError(f"tensor-parallel degree {degree} needs {degree} devices, there are {self.n_devices}")
            self.time.cost(degree)

    @property
    def load_seconds(self) -> float:
        """Seconds before the first job of a device: it loads and compiles the base once, for all its jobs."""
        cost = self.time.cost(min(self.degrees))
        return 0.0 if self.is_loaded else cost.load + cost.compile

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence of all trials."""
        return max(load.longest for load in self.loads)


def legal_degrees(spec: ModelSpec, n_devices: int) -> tuple[int, ...]:
    """Tensor-parallel degrees up to ``n_devices``: powers of two that divide the heads and key-value heads."""
    degrees = []
    degree = 1
    while degree <= n_devices:
        if spec.num_heads % degree == 0 and spec.num_kv_heads % degree == 0:
            degrees.append(degree)
        degree *= 2
    return tuple(degrees)


def load_trials(
    trials: Sequence[Trial],
    spec: ModelSpec,
    lengths: Callable[[Trial], Sequence[int]],
    *,
    eval_tokens: Callable[[Trial], int] | None = None,
    generated_tokens: Callable[[Trial], int] | None = None,
    labels: Callable[[Trial], int] | None = None,
) -> list[Load]:
    """Turn trials into loads.

    Args:
        trials: the trials, the default one included.
        spec: the base model; checks the target modules.
        lengths: tokens of each training example of a trial.
        eval_tokens: tokens a trial is evaluated on over its whole training; None for no evaluation.
        generated_tokens: tokens a trial generates over its whole training; None for no generation.
        labels: labelled tokens of all training examples of a trial; None where every token is.

    Raises:
        ValueError: if a trial has no examples or targets a module that the model lacks.
    """
    loads = []
    for trial in trials:
        sizes = lengths(trial)
        if len(sizes) == 0:
            raise ValueError(f"trial {trial.name}: its data set {trial.dataset!r} has no training examples")
        targeted(spec, trial.adapter.target_modules)
        total, squares = int(sum(sizes)), float(sum(size * size for size in sizes))
        variance = squares / len(sizes) - (total / len(sizes)) ** 2
        batch = min(trial.batch_size, len(sizes))
        loads.append(
            Load(
                name=trial.name,
                rank=trial.adapter.rank,
                steps=trial.total_steps(len(sizes)),
                tokens_per_step=batch * total / len(sizes),
                longest=int(max(sizes)),
                target_modules=trial.adapter.target_modules,
                eval_tokens=eval_tokens(trial) if eval_tokens else 0,
                generated_tokens=generated_tokens(trial) if generated_tokens else 0,
                labels_per_step=batch * labels(trial) / len(sizes) if labels else None,
                squares_per_step=batch * squares / len(sizes),
                sequences_per_step=batch,
                spread=(batch * max(0.0, variance)) ** 0.5,
            )
        )
    return loads


def group_loads(loads: Sequence[Load], among: Iterable[int] | None = None) -> list[list[int]]:
    """Indices of loads that are alike, each group in the order given; groups in order of first appearance.

    ``among``: which loads; None for all.
    """
    groups: dict[tuple, list[int]] = {}
    for index in range(len(loads)) if among is None else among:
        groups.setdefault(loads[index].kind, []).append(index)
    return list(groups.values())


def smallest_parts(problem: Problem, load: Load, degree: int) -> MemoryParts:
    """What a trial needs at the least: alone, in microbatches of its longest sequence or of the budget given."""
    tokens = problem.token_budget or load.longest
    size = problem.memory.adapter_bytes(load.rank, load.target_modules, degree)
    return problem.memory.parts_from_bytes(size, tokens, load.rank, degree=degree, generation=problem.generation)


class DoesNotFitError(ValueError):
    """A trial fits nowhere even alone.

    Args:
        message: as of ``ValueError``.
        need: bytes that it needs on each device.
    """

    def __init__(self, message: str, need: int) -> None:
        super().__init__(message)
        self.need = need


def check_fits(problem: Problem) -> None:
    """Refuse trials that fit on no device group even alone.

    Raises:
        DoesNotFitError: naming the trial that needs most, the numbers by part, and what to change.
    """
    degree = max(problem.degrees)
    misfits = []
    for load in problem.loads:
        parts = smallest_parts(problem, load, degree)
        if min(smallest_parts(problem, load, d).total for d in problem.degrees) > problem.free_bytes:
            misfits.append((parts.total, load, parts))
    if not misfits:
        return
    need, load, parts = max(misfits, key=lambda misfit: misfit[0])
    where = "the device" if degree == 1 else f"each of {degree} devices"
    others = f" ({len(misfits)} trials do not fit; this one needs most)" if len(misfits) > 1 else ""
    raise DoesNotFitError(
        f"trial {load.name} (rank {load.rank}, longest sequence {load.longest} tokens) does not fit even alone: it "
        f"needs {format_bytes(need)} on {where}, {format_bytes(problem.free_bytes)} are free{others}. "
        f"By part: {parts.describe()}. To change: {_remedies(problem, parts)}.",
        need,
    )


def _remedies(problem: Problem, parts: MemoryParts) -> str:
    memory = problem.memory
    remedies = []
    if parts.base > problem.free_bytes // 2 and memory.quantize is None and memory.device == "cuda":
        remedies.append("dtype: nf4")
    if memory.dtype == "fp32":
        remedies.append("dtype: bf16")
    if parts.generation > parts.microbatch:
        remedies.append("fewer rows or new tokens in evaluation.generation")
    elif not memory.activation_checkpointing:
        remedies.append("activation_checkpointing: true")
    if parts.activations > problem.free_bytes // 10:
        remedies.append("a smaller max_seq_len" + (" or tokens_per_microbatch" if problem.token_budget else ""))
    if parts.adapters > problem.free_bytes // 10:
        remedies.append("a smaller rank or fewer target_modules")
        if memory.moments == "exact":
            remedies.append("optimizer_state: 8bit")
    if memory.device == "cuda":
        remedies.append("more devices or devices with more memory")
    return ", ".join(remedies) or "a smaller model or more free memory"
