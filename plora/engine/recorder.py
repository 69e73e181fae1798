"""What must survive a trial: its weights on disk, its losses and its outcome in the study, its end in the events."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from plora.checkpoint.layout import EventLog, SweepLayout
from plora.checkpoint.state import load_state, save_state
from plora.modules.adapter import Adapter
from plora.search.study import SweepStudy
from plora.search.trial import Trial
from plora.training.metrics import Score
from plora.training.records import VAL_LOSS, EvalRecord, Listener, RoundRecord, TrialResult

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Recorder(Listener):
    """Keeps what the training tells.

    Args:
        layout: where to.
        study: gets each validation loss as an intermediate value, and a trial's outcome as soon as it is known.
        events: gets starts and ends.
        objective: name of the score that is a trial's outcome.
    """

    def __init__(self, layout: SweepLayout, study: SweepStudy, events: EventLog, objective: str) -> None:
        self.results: dict[str, TrialResult] = {}
        self.base_scores: dict[str, dict[str, Score]] = {}
        self.tokens = 0
        self.train_seconds = 0.0
        self._layout, self._study, self._events, self._objective = layout, study, events, objective

    def close(self) -> None:
        """Nothing is left open."""

    def on_start(self, trial: Trial, total_steps: int) -> None:
        """See ``Listener``."""
        self._events.event("trial_started", trial=trial.name, steps=total_steps)

    def on_round(self, record: RoundRecord) -> None:
        """See ``Listener``."""
        self.tokens += record.tokens
        self.train_seconds += record.seconds

    def on_eval(self, trial: Trial | None, record: EvalRecord) -> None:
        """See ``Listener``."""
        if trial is None:
            self.base_scores[record.task] = dict(record.scores)
        elif VAL_LOSS in record.scores and math.isfinite(record.scores[VAL_LOSS].value):
            self._study.report(trial.number, record.step, record.scores[VAL_LOSS].value)

    def on_finish(self, trial: Trial, result: TrialResult, adapter: Adapter) -> None:
        """See ``Listener``."""
        if result.status == "completed":
            save_factors(self._layout, trial, adapter)
        self.results[trial.name] = result
        self._tell_outcome(trial, result)
        self._events.event("trial_ended", trial=trial.name, status=result.status, steps=result.steps)

    def _tell_outcome(self, trial: Trial, result: TrialResult) -> None:
        # Not left to the end of the sweep, which may never come.
        values, errors = values_and_errors(result.scores)
        if result.status != "completed":
            self._study.fail(trial.number, f"{result.status} after {result.steps} steps", values)
        elif self._objective in result.scores:
            self._study.finish(trial.number, values[self._objective], values, errors)


def values_and_errors(scores: Mapping[str, Score]) -> tuple[dict[str, float], dict[str, float]]:
    """The values and the standard errors, by name, as the study stores them."""
    return (
        {name: score.value for name, score in scores.items()},
        {name: score.stderr for name, score in scores.items()},
    )


def save_factors(layout: SweepLayout, trial: Trial, adapter: Adapter) -> None:
    """Write an adapter's exact weights to the sweep's checkpoints."""
    factors = adapter.factors().items()
    tensors = {f"{path}.{name}": x for path, pair in factors for name, x in zip("AB", pair, strict=True)}
    save_state(layout.state(trial.name), tensors, {"trial": trial.name, "rank": trial.adapter.rank})


def load_factors(layout: SweepLayout, trial: Trial) -> Factors:
    """What ``save_factors`` wrote: A and B by module path."""
    tensors: dict[str, Any] = load_state(layout.state(trial.name))[0]
    paths = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {path: (tensors[f"{path}.A"], tensors[f"{path}.B"]) for path in paths}
