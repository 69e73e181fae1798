"""What reports say of a sweep as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plora.report.accuracy import Accuracy
from plora.report.results import DIRECTIONS


@dataclass(frozen=True)
class SweepInfo:
    """A sweep's frame: on what, for what, how fast.

    Args:
        name: what it is called, as a rule its output directory's name.
        output_dir: where its results lie.
        base_name: hub id or folder of the base model.
        base_revision: its commit; None for a folder.
        objective: name of the score that ranks the trials, such as ``exact_match``.
        direction: ``maximize`` or ``minimize`` it.
        tokens: tokens trained on, of all trials.
        train_seconds: time spent training them, evaluations left out.
        total_seconds: from start to end.
        details: further lines as heading and text.
        accuracies: predictions beside what was measured, by job and for the whole sweep.
    """

    name: str
    output_dir: Path
    base_name: str
    base_revision: str | None = None
    objective: str = "val_loss"
    direction: str = "minimize"
    tokens: int = 0
    train_seconds: float = 0.0
    total_seconds: float = 0.0
    details: Mapping[str, str] = field(default_factory=dict)
    accuracies: Sequence[Accuracy] = ()

    def __post_init__(self) -> None:
        assert self.direction in DIRECTIONS, self.direction

    @property
    def tokens_per_second(self) -> float | None:
        """Training tokens a second of all trials together, evaluations left out."""
        return self.tokens / self.train_seconds if self.train_seconds > 0 else None

    @property
    def better(self) -> str:
        """``higher`` or ``lower``."""
        return "higher" if self.direction == "maximize" else "lower"
