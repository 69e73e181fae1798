"""Calibration: measured rounds correct the time model, measured peaks the memory model.

Both fits start from what the data sheet says and move away from it only as far as measurements ask for. So a dozen
rounds of one shape scale the whole model, and rounds of many shapes tell its coefficients apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from plora.modules.config import AdapterConfig
from plora.profiler.memory import GIB, MIB, OVERHEAD, MemoryModel, MemoryParts, Saved
from plora.profiler.time import StepCost

# What it costs a coefficient to be twice the scaled prior's, in squared relative errors of rounds: as much as being 1%
# off on one round, and more where rounds are noisy: then they say little of single coefficients.
PRIOR_WEIGHT = 1e-4
NOISE_WEIGHT = 3.0
# Tokens of a microbatch up to which a round shows what it takes however few there are.
SMALL_TOKENS = 512
# A coefficient that the prior takes for nothing may yet explain this part of a round.
SHARE = 0.1
# The same, for each measured peak, for the memory model's factor being off by one and for what libraries hold being off
# by so many bytes. That is much the same on every GPU, and would else take in what the factor cannot explain; a CPU's
# peaks are those of a whole process.
ACTIVATIONS_WEIGHT = 1e-7
LIBRARIES_WEIGHT, LIBRARY_BYTES = {"cuda": 1e-4, "cpu": 1e-7}, 100 * MIB

COEFFICIENTS = (
    "floor", "per_microbatch", "per_token", "per_token_rank", "per_adapter", "per_param", "per_step", "per_label",
    "per_square", "per_sequence", "per_tile",
)  # fmt: skip
_OTHERS = ("per_eval_token", "per_generated_token", "per_decode_step")


@dataclass(frozen=True)
class RoundSample:
    """A measured round.

    Args:
        tokens: tokens of all adapters.
        token_rank: each adapter's tokens times its computed rank, summed.
        adapters: adapters that contributed.
        params: their parameters on the device.
        microbatches: microbatches the round was split into.
        seconds: what it took, optimizer included.
        labels: labelled tokens; None where all are.
        squares: squared lengths of the sequences, summed.
        sequences: how many of them.
    """

    tokens: float
    token_rank: float
    adapters: int
    params: float
    microbatches: int
    seconds: float
    labels: float | None = None
    squares: float = 0.0
    sequences: float = 0.0

    def __post_init__(self) -> None:
        if not self.seconds > 0 or self.microbatches < 1:
            raise ValueError(f"a measured round needs positive seconds and a microbatch, got {self}")

    def predicted(self, cost: StepCost) -> float:
        """Seconds that a time model gives this round."""
        return cost.round_seconds(
            self.tokens, self.token_rank, self.adapters, self.params, self.microbatches, self.labels, self.squares,
            self.sequences,
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        """Equal for rounds that are much alike: adapters, microbatches, tokens to a quarter of a doubling, labels and
        parameters to one.
        """
        labels = self.tokens if self.labels is None else self.labels
        tokens, labels, params = (float(np.log2(max(1.0, x))) for x in (self.tokens, labels, self.params))
        return self.adapters, self.microbatches, round(4 * tokens), round(labels), round(params)


def typical(samples: Sequence[RoundSample]) -> list[RoundSample]:
    """One round for all that are alike: their mean, with the median of their seconds, which no straggler moves."""
    groups: dict[tuple[int, ...], list[RoundSample]] = {}
    for sample in samples:
        groups.setdefault(sample.shape, []).append(sample)
    return [_mean(group) for group in groups.values()]


def _mean(group: Sequence[RoundSample]) -> RoundSample:
    def mean(name: str) -> float:
        return float(np.mean([getattr(sample, name) for sample in group]))

    labels = [sample.tokens if sample.labels is None else sample.labels for sample in group]
    return replace(
        group[0],
        tokens=mean("tokens"),
        token_rank=mean("token_rank"),
        params=mean("params"),
        seconds=float(np.median([sample.seconds for sample in group])),
        labels=float(np.mean(labels)),
        squares=mean("squares"),
        sequences=mean("sequences"),
    )


def fit_time(samples: Sequence[RoundSample], prior: StepCost, *, graphs: bool = False) -> StepCost:
    """Fit a round's coefficients, none negative.

    The least sum of squared relative errors, and of squared relative distances from the prior times ``PRIOR_WEIGHT``,
    after the prior was scaled to the samples' median. That weight is larger where rounds are noisy: what a first fit
    leaves unexplained says how noisy they are. Which rounds are at the launch floor is not known: rounds are
    ordered by tokens per microbatch, every cut between the lower, at the floor, and the upper is tried, and the one
    that predicts all rounds best is kept.

    Args:
        samples: measured rounds; of several sizes, ranks and numbers of adapters to tell coefficients apart, and at
            least one of them so small that it shows the launch floor.
        prior: where to start; gives what rounds cannot show (start-up, saving) as it is.
        graphs: whether CUDA graphs launch small rounds. Their time still grows with them, and a floor that a fit finds
            is wrong for others; but weights must be read all the same, so that there is none small rounds have to show.

    Raises:
        ValueError: without samples.
    """
    if not samples:
        raise ValueError("no measured rounds to calibrate the time model with: measure at least one")
    scaled = rescale(samples, prior)
    if graphs and min(sample.tokens / sample.microbatches for sample in samples) <= SMALL_TOKENS:
        scaled = replace(scaled, floor=0.0)
    first = _fit(samples, scaled, PRIOR_WEIGHT, prior.per_param)
    noise = relative_error(samples, first) ** 2 * len(samples) / max(1, len(samples) - len(COEFFICIENTS) // 2)
    return _fit(samples, scaled, max(PRIOR_WEIGHT, NOISE_WEIGHT * noise), prior.per_param)


def _fit(samples: Sequence[RoundSample], scaled: StepCost, weight: float, per_param: float) -> StepCost:
    best, least = scaled, _objective(samples, scaled, scaled, weight)
    ordered = sorted(samples, key=lambda sample: sample.tokens / sample.microbatches)
    for cut in range(max(1, len(ordered) * 2 // 3) if scaled.floor else 1):
        cost = _fit_cut(ordered, cut, scaled, weight, per_param)
        if (error := _objective(samples, cost, scaled, weight)) < least:
            best, least = cost, error
    return best


def rescale(samples: Sequence[RoundSample], prior: StepCost) -> StepCost:
    """The prior with every coefficient of a round times the median of measured over predicted."""
    factor = float(np.median([sample.seconds / sample.predicted(prior) for sample in samples]))
    scaled = {name: getattr(prior, name) * factor for name in (*COEFFICIENTS, *_OTHERS)}
    return replace(prior, **scaled, estimated=False)


def relative_error(samples: Sequence[RoundSample], cost: StepCost) -> float:
    """Root mean square of predicted over measured minus one."""
    return float(np.sqrt(np.mean([(sample.predicted(cost) / sample.seconds - 1) ** 2 for sample in samples])))


def _objective(samples: Sequence[RoundSample], cost: StepCost, scaled: StepCost, weight: float) -> float:
    away = (_values(cost) - _values(scaled)) / _units(samples, scaled)
    return len(samples) * relative_error(samples, cost) ** 2 + weight * float(np.sum(away**2))


def _values(cost: StepCost) -> np.ndarray:
    return np.array([getattr(cost, name) for name in COEFFICIENTS])


def _units(samples: Sequence[RoundSample], scaled: StepCost) -> np.ndarray:
    """How far each coefficient may easily be from the prior's: as much again, or so far that it explains a tenth of the
    usual round, whichever is more.
    """
    seconds = float(np.median([sample.seconds for sample in samples]))
    usual = np.median([_features(sample, scaled) for sample in samples], axis=0)
    return np.maximum(_values(scaled), SHARE * seconds / np.maximum(usual, 1.0))


def _features(sample: RoundSample, scaled: StepCost, floor: bool = False) -> list[float]:
    """What each coefficient is multiplied with in a round that is at the launch floor, or in one that is not."""
    labels = sample.tokens if sample.labels is None else sample.labels
    tokens = scaled.even_tokens(sample.tokens, sample.microbatches)
    tokens = scaled.product_tokens(tokens, sample.microbatches)
    work = [sample.microbatches, tokens, sample.token_rank, sample.adapters]
    more = [labels, sample.squares, sample.sequences, sample.microbatches * scaled.tiles(sample.params)]
    if floor:
        return [sample.microbatches, 0.0, 0.0, 0.0, 0.0, sample.params, 1.0, 0.0, 0.0, 0.0, 0.0]
    return [0.0, *work, sample.params, 1.0, *more]


def _fit_cut(ordered: Sequence[RoundSample], cut: int, scaled: StepCost, weight: float, per_param: float) -> StepCost:
    """The fit with the first ``cut`` rounds at the floor, and no less than ``per_param``."""
    rows = [[x / s.seconds for x in _features(s, scaled, floor=i < cut)] for i, s in enumerate(ordered)]
    units = _units(ordered, scaled)
    matrix = np.vstack((np.array(rows) * units, np.eye(len(units)) * weight**0.5))
    target = np.concatenate((np.ones(len(ordered)), _values(scaled) / units * weight**0.5))
    least = _least(ordered, per_param) / units
    coefficients = (least + non_negative(matrix, target - matrix @ least)) * units
    fitted: dict[str, Any] = dict(zip(COEFFICIENTS, map(float, coefficients), strict=True))
    return replace(scaled, **fitted | {"floor": _floor(ordered, cut, fitted)})


def _least(samples: Sequence[RoundSample], per_param: float) -> np.ndarray:
    """What coefficients cannot be below.

    The optimizer reads and writes every parameter, so its cost is known better than rounds can tell it from other costs
    of an adapter: it is no less than the prior's ``per_param``, but no more than half of any round.
    """
    known = min(per_param, *(0.5 * sample.seconds / max(1.0, sample.params) for sample in samples))
    return np.array([known if name == "per_param" else 0.0 for name in COEFFICIENTS])


def _floor(ordered: Sequence[RoundSample], cut: int, fitted: Mapping[str, float]) -> float:
    """The floor by the median of the first ``cut`` rounds: what the host takes for launches varies by a quarter.

    Without any, all that is known is that it is no higher than the fastest round.
    """
    if cut == 0:
        return min(fitted["floor"], min(s.seconds / s.microbatches for s in ordered))
    beside = [s.params * fitted["per_param"] + fitted["per_step"] for s in ordered[:cut]]
    left = [(s.seconds - more) / s.microbatches for s, more in zip(ordered, beside, strict=False)]
    return max(0.0, float(np.median(left)))


def non_negative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The least-squares solution with no negative entry (Lawson and Hanson, Solving Least Squares Problems, 23.3)."""
    n = matrix.shape[1]
    x, free = np.zeros(n), np.zeros(n, dtype=bool)
    for _ in range(10 * n):
        gradient = matrix.T @ (target - matrix @ x)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= 1e-10 * np.abs(matrix.T @ target).max():
            break
        free[int(gradient.argmax())] = True
        while True:
            trial = np.zeros(n)
            trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if (trial[free] > 0).all():
                break
            leaving = free & (trial <= 0)
            step = float(np.min(x[leaving] / (x[leaving] - trial[leaving])))
            x = x + step * (trial - x)
            free &= x > 1e-12 * max(1.0, float(x.max()))
            x[~free] = 0.0
            if not free.any():
                return x
        x = trial
    return x


@dataclass(frozen=True)
class MemorySample:
    """A measured peak.

    Args:
        adapter_bytes: training state of the adapters that were alive.
        max_rank: the largest rank among them.
        tokens: tokens of the largest microbatch.
        peak_bytes: bytes allocated at the peak.
        reserved_bytes: bytes that the allocator held then; None where there is no such number.
        degree: tensor-parallel degree.
        labels: labelled tokens of that microbatch; None where all are.
    """

    adapter_bytes: int
    max_rank: int
    tokens: int
    peak_bytes: int
    reserved_bytes: int | None = None
    degree: int = 1
    labels: int | None = None

    def __post_init__(self) -> None:
        if self.peak_bytes < 1 or self.tokens < 1:
            raise ValueError(f"a measured peak needs tokens and bytes, got {self}")

    @classmethod
    def of(
        cls, model: MemoryModel, adapters: Sequence[AdapterConfig], tokens: int, peak_bytes: int, degree: int = 1
    ) -> MemorySample:
        """The sample of a pack of these adapters."""
        state = sum(model.adapter_bytes(each.rank, each.target_modules, degree) for each in adapters)
        return cls(state, max(each.rank for each in adapters), tokens, peak_bytes, degree=degree)

    def predicted(self, model: MemoryModel) -> MemoryParts:
        """What a memory model says of this pack."""
        return model.parts_from_bytes(
            self.adapter_bytes, self.tokens, self.max_rank, degree=self.degree, labels=self.labels
        )


def fit_memory(model: MemoryModel, samples: Sequence[MemorySample]) -> MemoryModel:
    """The model corrected by measured peaks.

    ``peak = base + adapters + libraries + f * activations + max(f * in flight, logits)``: ``f`` and ``libraries`` by
    least squares of relative errors, neither negative, pulled slightly to one and to what is usual, so that samples of
    one size move the factor. The allocator's share becomes the largest that was seen, of small microbatches as a part
    of a GiB: what is idle beside them need not grow with them.

    Raises:
        ValueError: without samples.
    """
    if not samples:
        raise ValueError("no measured peaks to calibrate the memory model with: measure at least one pack")
    plain = replace(model, calibration=Saved())
    usual = OVERHEAD[plain.device]
    rows, rest, idle = [], [], []
    for s in samples:
        parts = s.predicted(plain)
        known = parts.base + parts.adapters + (parts.logits if parts.logits >= parts.in_flight else 0)
        scaled = parts.allocated - parts.libraries - known
        rows.append([scaled / s.peak_bytes, LIBRARY_BYTES / s.peak_bytes])
        rest.append((s.peak_bytes - known) / s.peak_bytes)
        if s.reserved_bytes is not None:
            idle.append((s.reserved_bytes - s.peak_bytes - usual.fixed) / max(parts.microbatch, GIB))
    pull = (len(rows) * np.array([ACTIVATIONS_WEIGHT, LIBRARIES_WEIGHT[plain.device]])) ** 0.5
    prior = np.array([1.0, usual.libraries / LIBRARY_BYTES])
    matrix = np.vstack((np.array(rows), np.diag(pull)))
    factor, libraries = non_negative(matrix, np.concatenate((rest, prior * pull)))
    return replace(
        model,
        calibration=Saved(
            activations=max(0.05, float(factor)),
            libraries=int(libraries * LIBRARY_BYTES),
            idle=max(0.0, *idle) if idle else None,
        ),
    )
