"""Predictions beside what was measured: how far the plan can be believed."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plora.checkpoint.atomic import atomic_file
from plora.profiler.memory import format_bytes
from plora.report.text import duration

OFF_BY = 0.15
# Differences below these are too small to matter to anyone, whatever part of the whole they are.
_SMALLEST = {"s": 5.0, "bytes": 256 * 2**20}


@dataclass(frozen=True)
class Compared:
    """One figure.

    Args:
        what: what it is, in words.
        predicted: in ``unit``.
        measured: in ``unit``; None where it cannot be measured here.
        unit: ``s`` or ``bytes``.
        is_limit: the prediction is a limit, so that measuring less is right.
    """

    what: str
    predicted: float
    measured: float | None
    unit: str
    is_limit: bool = False

    @property
    def error(self) -> float | None:
        """Measured over predicted minus one: 0.1 where it took 10% more than predicted; None where unknown."""
        return self.measured / self.predicted - 1 if self.measured is not None and self.predicted > 0 else None

    @property
    def is_off(self) -> bool:
        """Whether the prediction missed by more than it should."""
        if self.error is None or self.measured is None or (self.is_limit and self.error < 0):
            return False
        return abs(self.error) > OFF_BY and abs(self.measured - self.predicted) >= self._least

    def shown(self) -> tuple[str, str, str]:
        """Predicted, measured and the difference, as text."""
        # Where both are small, so is the difference, however many times the prediction it is.
        is_told = self.error is not None and max(self.predicted, self.measured or 0.0) >= self._least
        error = f"{self.error:+.0%}" if is_told else "–"
        return self._text(self.predicted), self._text(self.measured), error

    @property
    def _least(self) -> float:
        # Of a step, which is made thousands of times, no difference is small.
        return 0.0 if self.what == "step" else _SMALLEST[self.unit]

    def _text(self, value: float | None) -> str:
        if value is None:
            return "–"
        if self.unit == "bytes":
            return format_bytes(value)
        return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 10 else duration(value)


@dataclass(frozen=True)
class Accuracy:
    """The figures of a job, or of the whole sweep.

    Args:
        name: ``job 0``, ``sweep``.
        figures: in the order in which they are shown.
    """

    name: str
    figures: tuple[Compared, ...]


def warnings(accuracies: Sequence[Accuracy], estimated: bool) -> list[str]:
    """A line for every prediction that missed by more than it should.

    Args:
        accuracies: of all jobs and the sweep.
        estimated: whether times were predicted from data sheets.
    """
    lines = []
    for accuracy in accuracies:
        for figure in accuracy.figures:
            if figure.is_off and figure.error is not None:
                predicted, measured, _ = figure.shown()
                more = "more" if figure.error > 0 else "less"
                source = " (from data sheets)" if estimated and figure.unit == "s" else ""
                lines.append(
                    f"{accuracy.name}, {figure.what}: {abs(figure.error):.0%} {more} than predicted{source}: "
                    f"{measured} against {predicted}"
                )
    return lines


def write_accuracy(path: str | Path, accuracies: Sequence[Accuracy]) -> None:
    """Write ``predictions.csv``, atomically: one line a figure, in seconds and bytes."""
    with atomic_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("of", "figure", "unit", "predicted", "measured", "measured_over_predicted"))
        for accuracy in accuracies:
            for figure in accuracy.figures:
                ratio = None if figure.error is None else round(1 + figure.error, 4)
                row = (accuracy.name, figure.what, figure.unit, figure.predicted, figure.measured, ratio)
                writer.writerow(["" if value is None else value for value in row])
