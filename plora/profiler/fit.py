"""Calibration: least squares over measured rounds for the time model, over measured peaks for the memory model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from plora.modules.config import AdapterConfig
from plora.profiler.memory import MemoryModel, Saved
from plora.profiler.time import StepCost

# Fewer rounds than this only rescale what the data sheet says.
MIN_SAMPLES = 5


@dataclass(frozen=True)
class RoundSample:
    """A measured round.

    Args:
        tokens: tokens of all adapters.
        token_rank: each adapter's tokens times its rank, summed.
        adapters: adapters that contributed.
        params: their parameters on the device.
        microbatches: microbatches the round was split into.
        seconds: what it took, optimizer included.
    """

    tokens: float
    token_rank: float
    adapters: int
    params: float
    microbatches: int
    seconds: float

    def __post_init__(self) -> None:
        if not self.seconds > 0 or self.microbatches < 1:
            raise ValueError(f"a measured round needs positive seconds and a microbatch, got {self}")

    def predicted(self, cost: StepCost) -> float:
        """Seconds that a time model gives this round."""
        return cost.round_seconds(self.tokens, self.token_rank, self.adapters, self.params, self.microbatches)


def fit_time(samples: Sequence[RoundSample], prior: StepCost) -> StepCost:
    """Fit a round's coefficients, none negative, to the least sum of squared relative errors.

    Which rounds are at the launch floor is not known: rounds are ordered by tokens per microbatch, every cut between
    the lower, at the floor, and the upper is tried, and the one that predicts all rounds best is kept.

    Args:
        samples: measured rounds of several sizes, ranks and numbers of adapters, at least one of them so small that
            it shows the launch floor.
        prior: gives what rounds cannot show (start-up, evaluation, saving), and everything but a common factor where
            there are fewer than five rounds.

    Raises:
        ValueError: without samples.
    """
    if not samples:
        raise ValueError("no measured rounds to calibrate the time model with: measure at least one")
    if len(samples) < MIN_SAMPLES:
        return rescale(samples, prior)
    ordered = sorted(samples, key=lambda sample: sample.tokens / sample.microbatches)
    best = rescale(samples, prior)
    least = relative_error(samples, best)
    for cut in range(len(ordered) - 2):
        cost = _fit_cut(ordered, cut, prior)
        if cost is not None and (error := relative_error(samples, cost)) < least:
            best, least = cost, error
    return best


def rescale(samples: Sequence[RoundSample], prior: StepCost) -> StepCost:
    """The prior with every coefficient of a round times the median of measured over predicted."""
    factor = float(np.median([sample.seconds / sample.predicted(prior) for sample in samples]))
    names = ("floor", "per_microbatch", "per_token", "per_token_rank", "per_adapter", "per_param", "per_step")
    scaled = {name: getattr(prior, name) * factor for name in (*names, "per_eval_token", "per_generated_token")}
    return replace(prior, **scaled, estimated=False)


def relative_error(samples: Sequence[RoundSample], cost: StepCost) -> float:
    """Root mean square of predicted over measured minus one."""
    return float(np.sqrt(np.mean([(sample.predicted(cost) / sample.seconds - 1) ** 2 for sample in samples])))


def _fit_cut(ordered: Sequence[RoundSample], cut: int, prior: StepCost) -> StepCost | None:
    """The fit with the first ``cut`` rounds at the floor; None where no coefficients of a sound sign exist."""
    rows = []
    for i, s in enumerate(ordered):
        floor = i < cut
        linear = [0.0] * 4 if floor else [s.microbatches, s.tokens, s.token_rank, s.adapters]
        rows.append([s.microbatches if floor else 0.0, *linear, s.params, 1.0])
    matrix = np.array(rows, dtype=np.float64)
    seconds = np.array([s.seconds for s in ordered])
    coefficients = _non_negative(matrix / seconds[:, None], np.ones(len(ordered)))
    if coefficients is None or coefficients[2] == 0:
        return None
    if cut == 0:
        # No round was at the floor: it lies at or below the fastest microbatch.
        fastest = min(s.seconds / s.microbatches for s in ordered)
        coefficients[0] = min(prior.floor, fastest)
    names = ("floor", "per_microbatch", "per_token", "per_token_rank", "per_adapter", "per_param", "per_step")
    fitted = dict(zip(names, map(float, coefficients), strict=True))
    return replace(prior, **fitted, per_eval_token=fitted["per_token"] / 2, estimated=False)


def _non_negative(matrix: np.ndarray, target: np.ndarray) -> np.ndarray | None:
    """Least squares with no negative coefficient, by trying the sets of columns.

    Of these the least generalised cross-validation error, ``norm / (rows - columns)``, wins: few noisy rounds do not
    pay for many coefficients.
    """
    scale = np.abs(matrix).max(axis=0)
    columns = [c for c in range(matrix.shape[1]) if scale[c] > 0]
    answers = []
    for count in range(1, min(len(columns), len(target) - 1) + 1):
        for chosen in itertools.combinations(columns, count):
            part = matrix[:, chosen] / scale[list(chosen)]
            solution, _, rank, _ = np.linalg.lstsq(part, target, rcond=1e-10)
            if rank < count or (solution < 0).any():
                continue
            full = np.zeros(matrix.shape[1])
            full[list(chosen)] = solution / scale[list(chosen)]
            answers.append((float(np.linalg.norm(part @ solution - target)), count, full))
    if not answers:
        return None
    # An error of rounding size is a perfect fit.
    return min(answers, key=lambda answer: (max(answer[0], 1e-9) / (len(target) - answer[1]), answer[1]))[2]


@dataclass(frozen=True)
class MemorySample:
    """A measured peak: bytes allocated while this pack trained."""

    adapters: tuple[AdapterConfig, ...]
    tokens: int
    peak_bytes: int
    degree: int = 1


def fit_memory(model: MemoryModel, samples: Sequence[MemorySample]) -> MemoryModel:
    """The model corrected by measured peaks: least squares in ``peak = predicted rest + f * activations + fixed``.

    One sample, or samples of one size, cannot tell the two apart: then only the factor is fitted.

    Raises:
        ValueError: without samples.
    """
    if not samples:
        raise ValueError("no measured peaks to calibrate the memory model with: measure at least one pack")
    plain = replace(model, calibration=Saved())
    grows, rest = [], []
    for sample in samples:
        parts = plain.parts(sample.adapters, sample.tokens, degree=sample.degree)
        grows.append(float(parts.activations))
        rest.append(float(sample.peak_bytes - parts.base - parts.adapters - parts.logits))
    mean_x, mean_y = sum(grows) / len(grows), sum(rest) / len(rest)
    spread = sum((x - mean_x) ** 2 for x in grows)
    if spread <= (0.05 * mean_x) ** 2 * len(grows):
        return replace(model, calibration=Saved(activations=max(0.05, mean_y / mean_x)))
    factor = sum((x - mean_x) * (y - mean_y) for x, y in zip(grows, rest, strict=True)) / spread
    factor = max(0.05, factor)
    return replace(model, calibration=Saved(activations=factor, fixed=int(mean_y - factor * mean_x)))
