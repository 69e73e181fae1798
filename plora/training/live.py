"""A trial while it is in the pack: how far it is, what it does next, when it is evaluated."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from plora.data.stream import ExampleStream
from plora.data.types import Example, Task
from plora.search.trial import Trial
from plora.training.metrics import Score
from plora.training.records import VAL_LOSS, EvalRecord, Status, StepRecord, TrialResult
from plora.training.schedule import lr_factor, warmup_steps


def evaluation_steps(total: int, every: float | None) -> frozenset[int]:
    """Steps after which a trial of ``total`` steps is evaluated: at fractions of its training and at its end.

    Raises:
        ValueError: if ``every`` is not above 0 and at most 1.
    """
    if every is None:
        return frozenset({total})
    if not 0 < every <= 1:
        raise ValueError(f"evaluation every must be above 0 and at most 1, a part of each training, got {every}")
    every = max(every, 1 / total)  # not more often than after each step
    count = math.floor(1 / every + 1e-9)
    return frozenset({max(1, round(i * every * total)) for i in range(1, count + 1)} | {total})


@dataclass(eq=False)
class LiveTrial:
    """A trial in the pack.

    Args:
        trial: its settings.
        task: its data.
        slot: its adapter's slot.
        eval_steps: after which of its steps each score is due.
        step: steps queued so far; the host has been told of ``told`` of them.
    """

    trial: Trial
    task: Task
    slot: int
    eval_steps: Mapping[str, frozenset[int]]
    step: int = 0
    told: int = 0
    tokens: int = 0
    bad_steps: int = 0
    status: Status = "completed"
    losses: list[float] = field(default_factory=list)
    evals: list[EvalRecord] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def total(self) -> int:
        """Steps of its whole training."""
        return self.trial.total_steps(len(self.task.train))

    @property
    def is_done(self) -> bool:
        """Whether it leaves the pack."""
        return self.step >= self.total or self.status == "diverged"

    def batch(self) -> list[Example]:
        """The examples of its next step."""
        stream = ExampleStream(len(self.task.train), self.trial.batch_size, self.trial.seed)
        return [self.task.train[i] for i in stream.batch(self.step)]

    def rates(self) -> tuple[float, float]:
        """Learning rates of A and B at its next step."""
        given = self.trial.warmup_steps
        warmup = warmup_steps(self.total, self.trial.warmup_fraction) if given is None else given
        lr = self.trial.lr * lr_factor(self.step, self.total, warmup, self.trial.schedule)
        return lr, lr * self.trial.loraplus_ratio

    def is_due(self, score: str) -> bool:
        """Whether ``score`` is to be measured now."""
        return self.status != "diverged" and self.step in self.eval_steps[score]

    def tell(self, record: StepRecord, patience: int) -> None:
        """Take note of a step's outcome; ``patience`` skipped ones in a row are a divergence."""
        self.told = record.step
        self.tokens += record.tokens
        self.losses.append(record.loss)
        self.bad_steps = self.bad_steps + 1 if record.skipped else 0
        if self.bad_steps >= patience:
            self.status = "diverged"

    def result(self) -> TrialResult:
        """How it ended."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        last = finite[-max(1, len(finite) // 10) :]
        scores: dict[str, Score] = {}
        if self.status == "completed":
            scores = {
                name: score for each in self.evals if each.step == self.total for name, score in each.scores.items()
            }
            # The last steps may have blown it up without being followed by enough others to be noticed.
            if not all(math.isfinite(score.value) for name, score in scores.items() if name == VAL_LOSS):
                self.status, scores = "diverged", {}
        return TrialResult(
            trial=self.trial,
            status=self.status,
            steps=self.told,
            total_steps=self.total,
            tokens=self.tokens,
            seconds=time.perf_counter() - self.started,
            train_loss=math.fsum(last) / len(last) if last else math.nan,
            scores=scores,
            evals=tuple(self.evals),
        )
