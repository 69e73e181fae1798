"""What a running sweep tells whoever watches it.

The records are those of ``plora.training.records``, described by what
reports read of them, so that no report needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol


class StepRecord(Protocol):
    """One optimizer step of one trial."""

    @property
    def step(self) -> int:
        """Steps taken, this one included."""

    @property
    def total(self) -> int:
        """Steps the trial will take."""

    @property
    def loss(self) -> float:
        """Training loss of the batch, in nats a label token."""

    @property
    def lr(self) -> float:
        """Learning rate of the step."""

    @property
    def grad_norm(self) -> float:
        """Norm of the adapter's gradient before clipping."""

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""

    @property
    def skipped(self) -> bool:
        """Whether the step was left out because loss or gradient was not finite."""


class RoundRecord(Protocol):
    """One round of a pack."""

    @property
    def tokens(self) -> int:
        """Tokens trained on."""

    @property
    def seconds(self) -> float:
        """Time it took, evaluations left out."""


class Score(Protocol):
    """A mean over examples."""

    @property
    def value(self) -> float:
        """The mean."""

    @property
    def stderr(self) -> float:
        """Its standard error; NaN where unknown."""


class EvalRecord(Protocol):
    """Scores at one point of a training."""

    @property
    def step(self) -> int:
        """Steps taken; 0 for the base model."""

    @property
    def task(self) -> str:
        """Name of the data set."""

    @property
    def scores(self) -> Mapping[str, Score]:
        """By name, ``val_loss`` among them."""


class Listener:
    """Receives the events of a sweep; every method does nothing until overridden.

    ``trial`` has the fields of ``plora.search.trial.Trial``.
    """

    def on_start(self, trial: Any, total_steps: int) -> None:
        """The trial has entered a pack."""

    def on_step(self, trial: Any, record: StepRecord) -> None:
        """The trial has taken an optimizer step."""

    def on_round(self, record: RoundRecord) -> None:
        """All steps of a round have been told."""

    def on_eval(self, trial: Any | None, record: EvalRecord) -> None:
        """The trial, or the base model where None, was evaluated."""

    def on_finish(self, trial: Any, result: Any, adapter: Any) -> None:
        """The trial is over; ``result`` has the fields of ``plora.training.records.TrialResult``."""

    def close(self) -> None:
        """No event will follow."""


class Listeners(Listener):
    """Passes every event on to several listeners, in order."""

    def __init__(self, listeners: Sequence[Any]) -> None:
        self.listeners = tuple(listeners)

    def on_start(self, trial: Any, total_steps: int) -> None:
        """See ``Listener``."""
        for listener in self.listeners:
            listener.on_start(trial, total_steps)

    def on_step(self, trial: Any, record: StepRecord) -> None:
        """See ``Listener``."""
        for listener in self.listeners:
            listener.on_step(trial, record)

    def on_round(self, record: RoundRecord) -> None:
        """See ``Listener``."""
        for listener in self.listeners:
            listener.on_round(record)

    def on_eval(self, trial: Any | None, record: EvalRecord) -> None:
        """See ``Listener``."""
        for listener in self.listeners:
            listener.on_eval(trial, record)

    def on_finish(self, trial: Any, result: Any, adapter: Any) -> None:
        """See ``Listener``."""
        for listener in self.listeners:
            listener.on_finish(trial, result, adapter)

    def close(self) -> None:
        """See ``Listener``; all are closed, whichever raises."""
        with ExitStack() as stack:
            for listener in reversed(self.listeners):
                stack.callback(listener.close)
