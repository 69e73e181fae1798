"""``trials/<name>/metrics.jsonl``: every step and evaluation of a trial, for plots and scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plora.checkpoint.jsonl import JsonLines, read_jsonl
from plora.checkpoint.layout import SweepLayout
from plora.report.listener import EvalRecord, Listener, StepRecord
from plora.report.results import BASE


class MetricsFile(Listener):
    """Appends one JSON object per step and per evaluation to the trial's own file, the base model's to ``base``'s.

    Steps look like ``{"kind": "step", "step": 3, "loss": 1.2, ...}``, evaluations like
    ``{"kind": "eval", "step": 3, "val_loss": 1.1, "val_loss_se": 0.1, ...}``. A number that is not finite is written
    as null.
    """

    def __init__(self, layout: SweepLayout) -> None:
        self._layout = layout
        self._files: dict[str, JsonLines] = {}

    def on_step(self, trial: Any, record: StepRecord) -> None:
        """See ``Listener``."""
        self._file(trial.name).append(
            {
                "kind": "step",
                "step": record.step,
                "loss": record.loss,
                "lr": record.lr,
                "grad_norm": record.grad_norm,
                "tokens": record.tokens,
                "skipped": bool(record.skipped),
            }
        )

    def on_eval(self, trial: Any | None, record: EvalRecord) -> None:
        """See ``Listener``."""
        row: dict[str, Any] = {"kind": "eval", "step": record.step, "task": record.task}
        for name, score in record.scores.items():
            row |= {name: score.value, f"{name}_se": score.stderr}
        self._file(BASE if trial is None else trial.name).append(row)

    def on_finish(self, trial: Any, result: Any, adapter: Any) -> None:
        """See ``Listener``."""
        if trial.name in self._files:
            self._files.pop(trial.name).close()

    def close(self) -> None:
        """See ``Listener``."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, name: str) -> JsonLines:
        if name not in self._files:
            self._files[name] = JsonLines(self._layout.metrics(name))
        return self._files[name]


@dataclass(frozen=True)
class Curve:
    """Losses of one trial by step; non-finite ones are NaN."""

    train: list[tuple[int, float]] = field(default_factory=list)
    val: list[tuple[int, float]] = field(default_factory=list)


def read_curve(path: str | Path) -> Curve:
    """The curve in a ``metrics.jsonl``; where a step was written twice (a resumed run), the later one counts."""
    train: dict[int, float] = {}
    val: dict[int, float] = {}
    for record in read_jsonl(path):
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if record.get("kind") == "step" and "loss" in record:
            train[step] = _number(record["loss"])
        elif record.get("kind") == "eval" and "val_loss" in record:
            val[step] = _number(record["val_loss"])
    return Curve(sorted(train.items()), sorted(val.items()))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
