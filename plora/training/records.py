"""What a job is told and what it tells: settings, records of progress, results, and who listens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from plora.data.types import Task
from plora.modules.adapter import Adapter
from plora.search.trial import Trial
from plora.training.metrics import Score

VAL_LOSS = "val_loss"

Status = Literal["completed", "diverged"]


@dataclass(frozen=True)
class Scorer:
    """A further score of the validation examples, beside their loss.

    Args:
        name: what the score is called in records and results.
        score: the scores of several subjects (slots, or ``BASE``) on their tasks.
        every: measured after each such fraction of a trial's own training; None for the end only.
    """

    name: str
    score: Callable[[Mapping[int, Task]], Mapping[int, Score]]
    every: float | None = None


@dataclass(frozen=True)
class JobSettings:
    """How a job runs its trials; what is trained is the trials' own.

    Args:
        token_budget: most tokens of a training microbatch, as the memory model chose.
        eval_token_budget: most tokens of a forward without gradient; the training budget if None.
        eval_every: validation loss after each such fraction of a trial's own training, and at its
            end; None for the end only.
        evaluate_base: whether the base model is evaluated once per data set before training.
        base_known: names of data sets on which it has been evaluated already, by an earlier job.
        max_live: trials trained at the same time; the next one enters as one leaves. None for all.
        ready: from the names of the trials that have entered and of those that have left to those that may enter now,
            as a plan says; None lets the next in order enter. One for whose adapter the arena has no room waits on.
        patience: steps in a row with a non-finite loss or gradient after which a trial has diverged.
        optimizer_state: ``exact`` or ``8bit`` moments, see `PackedAdamW`.
        compile_loss: fuse the loss with ``torch.compile``; None for where that works and pays.
        graph_tokens: most tokens of a microbatch that runs as a CUDA graph, which takes the memory of its activations
            once more; None for those whose kernels take longer to launch than to run, 0 for none.
    """

    token_budget: int = 8192
    eval_token_budget: int | None = None
    eval_every: float | None = 0.1
    evaluate_base: bool = True
    base_known: frozenset[str] = frozenset()
    max_live: int | None = None
    ready: Callable[[Collection[str], Collection[str]], Sequence[str]] | None = None
    patience: int = 3
    optimizer_state: str = "exact"
    compile_loss: bool | None = None
    graph_tokens: int | None = None


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step of one trial.

    Args:
        step: steps done, from 1.
        total: steps of its whole training.
        loss: mean over the label tokens of its batch, before the update.
        lr: learning rate of the update (of A, with LoRA+).
        grad_norm: norm of its gradient before clipping.
        tokens: tokens of its batch.
        skipped: whether loss or gradient was not finite, so that nothing was updated.
    """

    step: int
    total: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    skipped: bool


@dataclass(frozen=True)
class RoundRecord:
    """One round of the job.

    Args:
        index: its number, from 1.
        tokens: real tokens trained on.
        padded_tokens: tokens computed that belong to no sequence.
        microbatches: forward and backward passes.
        seconds: time from the end of the round before, evaluations left out.
        live: trials that took part.
        tokens_left: estimate of the tokens still to be trained on in this job, waiting trials included.
        token_rank: tokens times computed rank, summed over the trials.
        labels: labelled tokens.
        squares: squared lengths of the sequences, summed.
        sequences: how many of them.
        params: parameters of the trials' adapters.
        set_up: microbatches for which a CUDA graph was prepared, which takes far longer than to replay it.
    """

    index: int
    tokens: int
    padded_tokens: int
    microbatches: int
    seconds: float
    live: int
    tokens_left: int
    token_rank: int = 0
    labels: int = 0
    squares: int = 0
    sequences: int = 0
    params: int = 0
    set_up: int = 0


@dataclass
class JobTimes:
    """What a job spent beside its rounds, in seconds.

    Args:
        base: evaluating the base model.
        evaluation: evaluating trials.
        saving: what listeners did when trials ended.
    """

    base: float = 0.0
    evaluation: float = 0.0
    saving: float = 0.0


@dataclass(frozen=True)
class EvalRecord:
    """Scores of one trial, or of the base, at a point of its training.

    Args:
        step: steps done; 0 for the base.
        total: steps of its whole training; 0 for the base.
        task: name of the data set.
        scores: those due at this step, by name; at the end of a training all of them.
    """

    step: int
    total: int
    task: str
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended.

    Args:
        trial: the trial.
        status: ``completed``, or ``diverged`` after too many non-finite steps in a row, or with a validation loss
            at its end that is not finite.
        steps: steps done, skipped ones included.
        total_steps: steps of its whole training.
        tokens: tokens trained on.
        seconds: time it was in the pack.
        train_loss: mean of the last tenth of its finite losses; NaN if there is none.
        scores: at the end, by name; empty for a diverged trial.
        evals: all its evaluations, in order.
    """

    trial: Trial
    status: Status
    steps: int
    total_steps: int
    tokens: int
    seconds: float
    train_loss: float
    scores: Mapping[str, Score] = field(default_factory=dict)
    evals: tuple[EvalRecord, ...] = ()


class Listener(Protocol):
    """What a job tells while it runs; derive from it and override what you need.

    Called on the training thread. Steps are told one round late, because the job does not wait for
    the device. What a listener raises stops the job.
    """

    def on_start(self, trial: Trial, total_steps: int) -> None:
        """A trial has entered the pack."""
        return

    def on_step(self, trial: Trial, record: StepRecord) -> None:
        """A trial has made a step."""
        return

    def on_round(self, record: RoundRecord) -> None:
        """All steps of a round have been told."""
        return

    def on_eval(self, trial: Trial | None, record: EvalRecord) -> None:
        """A trial, or the base model where None, has been evaluated."""
        return

    def on_finish(self, trial: Trial, result: TrialResult, adapter: Adapter) -> None:
        """A trial has ended; its adapter leaves the pack when this returns."""
        return


class Silence(Listener):
    """Listens to nothing."""
