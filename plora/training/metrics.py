"""Scores of predictions, their standard errors, and which trials are as good as the winner."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from plora.data.types import Example

Metric = Callable[[str, Example], float]


@dataclass(frozen=True)
class Score:
    """A mean over examples.

    Args:
        value: the mean.
        stderr: its standard error over the examples; NaN for fewer than two.
        per_example: one value per example, in the examples' order, for paired comparisons.
        weights: each example's weight in the mean, or empty where all are equal.
        examples: names the examples, so that only scores on the same ones are compared in pairs.
    """

    value: float
    stderr: float
    per_example: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    examples: str = ""

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.per_example)

    @classmethod
    def mean(cls, values: Sequence[float], weights: Sequence[float] = (), examples: str = "") -> Score:
        """The mean ``sum w x / sum w`` of ``values``, such as token losses of examples of ``w`` label tokens each.

        The standard error is that of a ratio estimator, by linearisation:
        ``sqrt(n / (n - 1) * sum w^2 (x - mean)^2) / sum w``; without weights the usual one.

        Raises:
            ValueError: if there is no value.
        """
        n, scale = len(values), list(weights) or [1.0] * len(values)
        if n == 0:
            raise ValueError("no examples to score: the split is empty")
        total = math.fsum(scale)
        mean = math.fsum(w * x for w, x in zip(scale, values, strict=True)) / total
        spread = math.fsum((w * (x - mean)) ** 2 for w, x in zip(scale, values, strict=True))
        stderr = math.sqrt(n / (n - 1) * spread) / total if n > 1 else math.nan
        return cls(mean, stderr, tuple(values), tuple(weights), examples)


def exact_match(answer: str | None = None) -> Metric:
    """1.0 where prediction and reference agree, else 0.0.

    Args:
        answer: a regular expression applied to both; its last match counts (its first group if it
            has one). A prediction without a match is wrong. A reference without one is taken as a
            whole, so that references may be bare answers. None compares whole texts.

    Raises:
        ValueError: if ``answer`` is no valid regular expression.
    """
    try:
        pattern = None if answer is None else re.compile(answer)
    except re.error as error:
        raise ValueError(f"evaluation answer {answer!r} is not a regular expression: {error}") from error

    def metric(prediction: str, example: Example) -> float:
        found, expected = _extract(pattern, prediction), _extract(pattern, example.answer)
        if expected is None:
            expected = example.answer
        return float(found is not None and _normalise(found) == _normalise(expected))

    return metric


def load_metric(path: str) -> Metric:
    """The callable ``(prediction, example) -> number`` at a dotted path such as ``my_package.metrics.rouge``.

    Raises:
        ValueError: if there is no such module, or nothing callable in it.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"metric {path!r} cannot be imported ({error}): give package.module.function, installed or on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ValueError(f"metric {path!r} is not callable: it must be a function of (prediction, example)")
    return found


def tied_with_winner(scores: Mapping[str, Score], *, maximize: bool) -> set[str]:
    """Names of the trials that cannot be told from the best one, itself included.

    A trial is tied where its difference from the winner is at most two standard errors. Trials
    scored on the same examples are compared example by example (their errors are correlated, so
    paired differences tell far more apart); others by the errors of their means.
    Trials with a value that is not finite neither win nor tie.
    """
    finite = {name: score for name, score in scores.items() if math.isfinite(score.value)}
    if not finite:
        return set()
    winner = (max if maximize else min)(finite.values(), key=lambda score: score.value)
    return {name for name, score in finite.items() if _within_noise(score, winner)}


def _within_noise(score: Score, winner: Score) -> bool:
    difference = abs(score.value - winner.value)
    if difference == 0:
        return True
    if score.n > 1 and (score.n, score.examples) == (winner.n, winner.examples):
        differences = [a - b for a, b in zip(score.per_example, winner.per_example, strict=True)]
        stderr = Score.mean(differences, score.weights).stderr
    else:
        stderr = math.hypot(score.stderr, winner.stderr)
    # An unknown error (one example) cannot tell two trials apart.
    return math.isnan(stderr) or difference <= 2 * stderr


def _extract(pattern: re.Pattern[str] | None, text: str) -> str | None:
    if pattern is None:
        return text
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    last = matches[-1]
    return last[1] if pattern.groups and last[1] is not None else last[0]


def _normalise(text: str) -> str:
    """Without thousands separators, repeated and surrounding white space, and closing punctuation (``"42."``)."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return " ".join(text.split()).rstrip(".,")
