"""The state behind the live view: where each trial stands, and how fast the sweep goes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from plora.report.listener import RoundRecord, StepRecord
from plora.report.results import is_number

WAITING, RUNNING = "waiting", "running"
_RATE_WINDOW = 30.0


@dataclass
class TrialProgress:
    """One trial as watched from outside. Times are seconds on the caller's clock."""

    name: str
    number: int
    settings: dict[str, Any]
    state: str = WAITING
    step: int = 0
    total: int | None = None
    first_step: int | None = None
    started: float | None = None
    updated: float | None = None
    tokens: int = 0
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None

    def tokens_per_second(self) -> float | None:
        """Tokens a second since it started."""
        return self.tokens / self._elapsed() if self._elapsed() else None

    def eta(self) -> float | None:
        """Seconds to its last step at its pace so far; a resumed trial's earlier steps don't count."""
        if self.state != RUNNING or self.total is None or self.first_step is None or not self._elapsed():
            return None
        done = self.step - self.first_step + 1
        return (self.total - self.step) * self._elapsed() / done

    def _elapsed(self) -> float:
        return self.updated - self.started if self.started is not None and self.updated is not None else 0.0

    def relevance(self) -> tuple[int, float, int]:
        """Sorts trials by how much one wants to see them: the running, the finished, the waiting; best first."""
        group = {RUNNING: 0, "complete": 1, WAITING: 3}.get(self.state, 2)
        losses = (self.best_val_loss, self.loss)
        return group, next((x for x in losses if x is not None and math.isfinite(x)), math.inf), self.number


@dataclass
class SweepProgress:
    """All trials of a sweep.

    Args:
        trials: by name, those announced or seen so far.
        started: when the sweep began, on the caller's clock.
        tokens: trained on so far.
        train_seconds: spent in rounds, evaluations left out.
        base_val_loss: the base model's validation loss by data set.
    """

    trials: dict[str, TrialProgress]
    started: float
    tokens: int = 0
    train_seconds: float = 0.0
    base_val_loss: dict[str, float] = field(default_factory=dict)
    recent: deque[tuple[float, int]] = field(default_factory=deque)

    def start(self, trial: TrialProgress, total: int, now: float) -> None:
        """The trial has begun; its pace is measured from here."""
        trial.state, trial.total, trial.started = RUNNING, total, now

    def add_step(self, trial: TrialProgress, record: StepRecord, now: float) -> None:
        """Takes in a training step."""
        if trial.first_step is None:
            trial.first_step = record.step
        trial.step, trial.total, trial.loss, trial.updated = record.step, record.total, float(record.loss), now
        trial.tokens += int(record.tokens)

    def add_round(self, record: RoundRecord) -> None:
        """Takes in a round, which tells the pace of all trials together."""
        self.tokens += record.tokens
        self.train_seconds += record.seconds
        self.recent.append((record.seconds, record.tokens))
        while len(self.recent) > 1 and sum(seconds for seconds, _ in self.recent) > _RATE_WINDOW:
            self.recent.popleft()

    def add_eval(self, trial: TrialProgress, val_loss: float | None) -> None:
        """Takes in a validation loss."""
        trial.val_loss = val_loss
        if is_number(val_loss) and (trial.best_val_loss is None or val_loss < trial.best_val_loss):
            trial.best_val_loss = val_loss

    def tokens_per_second(self) -> float | None:
        """Tokens a second of all trials together, over the last half minute of training."""
        seconds = sum(seconds for seconds, _ in self.recent)
        return sum(tokens for _, tokens in self.recent) / seconds if seconds > 0 else None

    def counts(self) -> dict[str, int]:
        """Number of trials in each state."""
        found: dict[str, int] = {}
        for trial in self.trials.values():
            found[trial.state] = found.get(trial.state, 0) + 1
        return found

    def steps(self) -> tuple[int, int]:
        """Steps done and steps in all; a trial that has not started yet counts like the mean of the others.

        A trial that is over needs no more steps, however early it ended.
        """
        totals = [trial.total for trial in self.trials.values() if trial.total is not None]
        typical = sum(totals) / len(totals) if totals else 0
        done = sum(trial.step for trial in self.trials.values())
        left = sum(self._left(trial, typical) for trial in self.trials.values())
        return done, round(done + left)

    def eta(self, now: float) -> float | None:
        """Seconds until all trials are over, at the pace so far."""
        done, total = self.steps()
        before = sum((trial.first_step or 1) - 1 for trial in self.trials.values())
        if done <= before or total <= done:
            return None
        return (total - done) * (now - self.started) / (done - before)

    def best(self) -> TrialProgress | None:
        """The trial with the lowest validation loss so far."""
        measured = [trial for trial in self.trials.values() if trial.best_val_loss is not None]
        return min(measured, key=lambda trial: trial.best_val_loss or math.inf, default=None)

    def most_relevant(self, rows: int) -> list[TrialProgress]:
        """At most ``rows`` trials, in the order of their numbers so that rows don't jump about."""
        chosen = sorted(self.trials.values(), key=TrialProgress.relevance)[: max(0, rows)]
        return sorted(chosen, key=lambda trial: trial.number)

    @staticmethod
    def _left(trial: TrialProgress, typical: float) -> float:
        if trial.state not in (WAITING, RUNNING):
            return 0
        return max(0, (typical if trial.total is None else trial.total) - trial.step)


def progress_of(trials: Iterable[Any], settings: Iterable[dict[str, Any]], now: float) -> SweepProgress:
    """A sweep of which no trial has started."""
    rows = [TrialProgress(trial.name, trial.number, one) for trial, one in zip(trials, settings, strict=True)]
    return SweepProgress({row.name: row for row in rows}, now)
