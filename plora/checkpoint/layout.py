"""Where everything in a sweep's output directory lies."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from plora.checkpoint.jsonl import JsonLines


@dataclass(frozen=True)
class SweepLayout:
    """The paths of one sweep; computing them touches no disk.

    Args:
        root: the sweep's ``output_dir``.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    @property
    def config(self) -> Path:
        """The resolved configuration, revisions included."""
        return self.root / "config.yaml"

    @property
    def plan(self) -> Path:
        """Who was to run with whom, when, and at what predicted cost."""
        return self.root / "plan.json"

    @property
    def plan_page(self) -> Path:
        """The preview of a plan as a page."""
        return self.root / "plan.html"

    @property
    def study(self) -> Path:
        """Optuna's database."""
        return self.root / "study.db"

    @property
    def study_url(self) -> str:
        """Optuna's storage address of ``study``."""
        return f"sqlite:///{self.study.resolve()}"

    @property
    def events(self) -> Path:
        """What happened, one JSON object a line."""
        return self.root / "events.jsonl"

    @property
    def log(self) -> Path:
        """The run's log."""
        return self.root / "log.txt"

    @property
    def results(self) -> Path:
        """The ranking as a table."""
        return self.root / "results.csv"

    @property
    def predictions_table(self) -> Path:
        """Predicted times and memory beside what was measured."""
        return self.root / "predictions.csv"

    @property
    def report(self) -> Path:
        """The ranking as a page."""
        return self.root / "report.html"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's run directories, one a trial."""
        return self.root / "tensorboard"

    @property
    def trials(self) -> Path:
        """Holds one directory a trial."""
        return self.root / "trials"

    @property
    def checkpoints(self) -> Path:
        """Exact fp32 states, which outlive a killed process."""
        return self.root / "checkpoints"

    def trial(self, name: str) -> Path:
        """The directory of a trial (or of the base model, named ``base``)."""
        if name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"a trial's name must be usable as a directory name, got {name!r}")
        return self.trials / name

    def adapter(self, name: str) -> Path:
        """The exported adapter: what peft and vLLM are pointed at."""
        return self.trial(name) / "adapter"

    def metrics(self, name: str) -> Path:
        """The trial's steps and evaluations, one JSON object a line."""
        return self.trial(name) / "metrics.jsonl"

    def predictions(self, name: str, split: str = "val") -> Path:
        """What the trial's adapter generated, one JSON object an example."""
        return self.trial(name) / f"predictions_{split}.jsonl"

    def state(self, name: str) -> Path:
        """The exact fp32 weights of a finished trial."""
        return self.checkpoints / f"{self.trial(name).name}.safetensors"

    def holds_sweep(self) -> bool:
        """Whether a sweep was started here, so that another must not overwrite it."""
        marks = (self.config, self.study, self.events, self.results, self.trials)
        return any(mark.exists() for mark in marks)

    def create(self) -> None:
        """Makes the directories.

        Raises:
            ValueError: if another sweep has made them: of two that start at once, one goes on.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            self.trials.mkdir()
        except FileExistsError:
            raise ValueError(
                f"output_dir = '{self.root}': another sweep has started there meanwhile: name another directory"
            ) from None
        self.checkpoints.mkdir(exist_ok=True)


class EventLog(JsonLines):
    """``events.jsonl``: what the sweep did and when, for people and for resuming."""

    def event(self, kind: str, **fields: Any) -> None:
        """Appends ``{"time": UTC in ISO 8601, "event": kind, **fields}``."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self.append({"time": now, "event": kind, **fields})
