"""One job: many trials trained side by side over one base model, round by round.

In a round every live trial contributes its next batch. The batches are cut into microbatches under
the token budget, gradients accumulate in the arena, and each trial then makes its own step. The host
never waits for the device inside a round: losses, norms and skip flags are copied out behind the
work and read one round later.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from plora.data.types import Task
from plora.models.base import BaseModel
from plora.modules.adapter import Layout
from plora.modules.packed import PackedAdapters
from plora.modules.targets import select
from plora.search.trial import Trial
from plora.training.budget import TokenBudget
from plora.training.evaluation import BASE, validation_losses
from plora.training.graphs import small_microbatches
from plora.training.live import LiveTrial, evaluation_steps
from plora.training.loss import can_compile
from plora.training.metrics import Score
from plora.training.optimizer import AdamWConfig, PackedAdamW
from plora.training.records import (
    VAL_LOSS,
    EvalRecord,
    JobSettings,
    JobTimes,
    Listener,
    RoundRecord,
    Scorer,
    Silence,
    StepRecord,
    TrialResult,
)
from plora.training.rounds import Readback, batch_gradients, work_of

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Round:
    """A round whose numbers are still on their way from the device."""

    record: RoundRecord
    steps: list[tuple[LiveTrial, StepRecord]]
    readback: Readback


class PackJob:
    """Trains trials as one pack.

    Args:
        base: the frozen base model.
        packed: its adapters, from ``pack_adapters(base.module, ...)``. Adapters that are in it already
            are taken by the trials of equal ``AdapterConfig``, in order; the others' are added. Give
            ``pack_adapters`` all configs where memory is tight: an arena that grows holds old and new
            for a moment.
        trials: what to train, in order of entry.
        tasks: the data of each trial, by trial name.
        settings: how to run.
        listener: is told about everything that happens.
        scorers: further scores of the validation examples.

    Raises:
        ValueError: if two trials share a name, or a trial has no examples to train or to be validated on.
    """

    def __init__(
        self,
        base: BaseModel,
        packed: PackedAdapters,
        trials: Sequence[Trial],
        tasks: Mapping[str, Task],
        settings: JobSettings | None = None,
        listener: Listener | None = None,
        scorers: Sequence[Scorer] = (),
    ) -> None:
        _check(trials, tasks)
        self.base, self.packed, self.tasks = base, packed, tasks
        self.trials = tuple(trials)
        self.settings = settings or JobSettings()
        self.listener = listener or Silence()
        self.optimizer = PackedAdamW(packed, self.settings.optimizer_state)
        compile_loss = self.settings.compile_loss
        self._compile_loss = can_compile(base.device) if compile_loss is None else compile_loss
        self._graphs = small_microbatches(
            base,
            packed,
            self.settings.graph_tokens,
            token_budget=self.settings.token_budget,
            compile_loss=self._compile_loss,
        )
        relief = None if self._graphs is None else self._graphs.release
        self.budget = TokenBudget(self.settings.token_budget, "training", relief)
        eval_tokens = self.settings.eval_token_budget or self.settings.token_budget
        self.eval_budget = TokenBudget(eval_tokens, "evaluation", relief)
        self.times = JobTimes()
        self._scorers = (Scorer(VAL_LOSS, self._validation_losses, self.settings.eval_every), *scorers)
        self._waiting = list(trials)
        self._live: dict[int, LiveTrial] = {}
        self._unclaimed = packed.slots
        self._results: dict[str, TrialResult] = {}
        self._queued: _Round | None = None
        self._rounds = 0
        self._example_tokens = _mean_lengths(tasks)

    def run(self) -> list[TrialResult]:
        """Train every trial to its end.

        Returns:
            Their results, in the order of the trials.
        """
        if self.settings.evaluate_base:
            self._evaluate_base()
        self._admit()
        while self._live:
            before, self._queued = self._queued, self._train_round()
            self._tell(before)
            if self._has_milestone():
                # What follows reads the device anyway, and a trial hears of its steps before its scores.
                before, self._queued = self._queued, None
                self._tell(before)
                self._evaluate()
                self._retire()
                self._admit()
        return [self._results[trial.name] for trial in self.trials]

    def _admit(self) -> None:
        while (trial := self._next()) is not None:
            self._waiting.remove(trial)
            task = self.tasks[trial.name]
            total = trial.total_steps(len(task.train))
            slot = self._claim(trial)
            self.optimizer.add(slot, AdamWConfig(trial.betas, trial.eps, trial.weight_decay, trial.max_grad_norm))
            due = {scorer.name: evaluation_steps(total, scorer.every) for scorer in self._scorers}
            self._live[slot] = LiveTrial(trial, task, slot, due)
            self.listener.on_start(trial, total)

    def _next(self) -> Trial | None:
        """The trial that enters now, if any."""
        if len(self._live) >= (self.settings.max_live or len(self.trials)):
            return None
        if self.settings.ready is None:
            return self._waiting[0] if self._waiting else None
        waiting = {trial.name: trial for trial in self._waiting}
        joined = {trial.name for trial in self.trials if trial.name not in waiting}
        for name in self.settings.ready(joined, set(self._results)):
            if not self._live or self._has_room(waiting[name]):
                return waiting[name]
        return None

    def _has_room(self, trial: Trial) -> bool:
        """Whether its adapter has a place that is free: growing would take more memory than was planned with."""
        if any(self.packed.adapters[slot].config == trial.adapter for slot in self._unclaimed):
            return True
        layout = Layout.of(select(self.packed.targets, trial.adapter), trial.adapter.rank)
        return self.packed.arena.fits(layout.numel)

    def _claim(self, trial: Trial) -> int:
        for slot in self._unclaimed:
            if self.packed.adapters[slot].config == trial.adapter:
                self._unclaimed.remove(slot)
                return slot
        return self.packed.add(trial.adapter)

    def _train_round(self) -> _Round:
        """Queue a round on the device: gradients of every live trial's next batch, then their steps."""
        live = list(self._live.values())
        readback = Readback(self.base.device)
        batches = {each.slot: each.batch() for each in live}
        rates = {each.slot: each.rates() for each in live}
        counts = {slot: sum(len(example) for example in batch) for slot, batch in batches.items()}
        work = work_of(self.packed, batches)
        done = {each.slot: each.step for each in live}
        graphs = self._graphs
        padding, set_up = (graphs.padding, graphs.set_up) if graphs else (0, 0)
        losses, n_microbatches = self.budget.run(
            lambda tokens: batch_gradients(
                self.base,
                self.packed,
                batches,
                done,
                tokens,
                compile_loss=self._compile_loss,
                graphs=graphs,
            ),
            smallest=max(len(example) for batch in batches.values() for example in batch),
        )
        padding, set_up = (graphs.padding - padding, graphs.set_up - set_up) if graphs else (0, 0)
        outcome = self.optimizer.step(rates, losses)
        readback.send(torch.stack((losses, outcome.grad_norm, outcome.skipped)))
        steps = []
        for each in live:
            each.step += 1
            lr, tokens = rates[each.slot][0], counts[each.slot]
            steps.append((each, StepRecord(each.step, each.total, math.nan, lr, math.nan, tokens, skipped=False)))
        self._rounds += 1
        record = RoundRecord(
            self._rounds, work["tokens"], padding, n_microbatches, 0.0, len(live), self._tokens_left(),
            token_rank=work["token_rank"], labels=work["labels"], squares=work["squares"],
            sequences=work["sequences"], params=work["params"], set_up=set_up,
        )  # fmt: skip
        return _Round(record, steps, readback)

    def _tell(self, queued: _Round | None) -> None:
        """Wait for a round's numbers and pass them on."""
        if queued is None:
            return
        (losses, norms, skipped), seconds = queued.readback.wait()
        for each, record in queued.steps:
            if each.status == "diverged":  # this step was on its way when that was seen
                continue
            slot = each.slot
            record = replace(record, loss=losses[slot], grad_norm=norms[slot], skipped=bool(skipped[slot]))
            each.tell(record, self.settings.patience)
            self.listener.on_step(each.trial, record)
            if each.status == "diverged":
                log.warning(
                    "%s diverged: %d steps in a row with a loss or gradient that is not finite, the last at step %d",
                    each.trial.name, self.settings.patience, record.step,
                )  # fmt: skip
        self.listener.on_round(replace(queued.record, seconds=seconds))

    def _has_milestone(self) -> bool:
        """Whether a trial is to be evaluated or leaves."""
        return any(
            each.is_done or any(each.is_due(scorer.name) for scorer in self._scorers) for each in self._live.values()
        )

    def _evaluate(self) -> None:
        """Take every score that is due, for all trials due at once."""
        began = time.perf_counter()
        scores: dict[int, dict[str, Score]] = {}
        for scorer in self._scorers:
            due = {slot: each.task for slot, each in self._live.items() if each.is_due(scorer.name)}
            for slot, score in (self._scores(scorer, due) if due else {}).items():
                scores.setdefault(slot, {})[scorer.name] = score
        for slot, by_name in scores.items():
            each = self._live[slot]
            record = EvalRecord(each.step, each.total, each.task.name, by_name)
            each.evals.append(record)
            self.listener.on_eval(each.trial, record)
        self.times.evaluation += time.perf_counter() - began

    def _scores(self, scorer: Scorer, tasks: Mapping[int, Task]) -> Mapping[int, Score]:
        try:
            return scorer.score(tasks)
        except torch.OutOfMemoryError:
            if self._graphs is None or not self._graphs.release():
                raise
        gc.collect()
        torch.cuda.empty_cache()
        return scorer.score(tasks)

    def _evaluate_base(self) -> None:
        """Score the base once per data set."""
        began = time.perf_counter()
        for task in _distinct(self.tasks[trial.name] for trial in self.trials):
            if task.name in self.settings.base_known:
                continue
            scores = {scorer.name: scorer.score({BASE: task})[BASE] for scorer in self._scorers}
            self.listener.on_eval(None, EvalRecord(0, 0, task.name, scores))
        self.times.base += time.perf_counter() - began

    def _validation_losses(self, tasks: Mapping[int, Task]) -> dict[int, Score]:
        examples = {subject: task.val for subject, task in tasks.items()}
        names = {subject: task.name for subject, task in tasks.items()}
        return validation_losses(self.base, self.packed, examples, self.eval_budget, names)

    def _retire(self) -> None:
        """Let the trials that are done go, and their adapters with them."""
        for slot, each in list(self._live.items()):
            if each.is_done:
                result = self._results[each.trial.name] = each.result()
                began = time.perf_counter()
                self.listener.on_finish(each.trial, result, self.packed.adapters[slot])
                self.times.saving += time.perf_counter() - began
                self.optimizer.remove(slot)
                self.packed.remove(slot)
                del self._live[slot]

    def _tokens_left(self) -> int:
        def estimate(trial: Trial, step: int) -> float:
            n = len(self.tasks[trial.name].train)
            steps = trial.total_steps(n) - step
            return steps * min(trial.batch_size, n) * self._example_tokens[trial.name]

        live = sum(estimate(each.trial, each.step) for each in self._live.values())
        return round(live + sum(estimate(trial, 0) for trial in self._waiting))


def _check(trials: Sequence[Trial], tasks: Mapping[str, Task]) -> None:
    names = [trial.name for trial in trials]
    if len(set(names)) < len(names):
        raise ValueError(f"trials must have different names, got {', '.join(sorted(names))}")
    for name in names:
        if name not in tasks:
            raise ValueError(f"trial {name} has no task: tasks are given for {', '.join(sorted(tasks)) or 'none'}")
        for split in ("train", "val"):
            if not getattr(tasks[name], split):
                raise ValueError(f"data set {tasks[name].name!r} of trial {name} has no {split} examples")


def _distinct(tasks: Iterable[Task]) -> list[Task]:
    return list({id(task): task for task in tasks}.values())


def _mean_lengths(tasks: Mapping[str, Task]) -> dict[str, float]:
    """Mean tokens of a training example, by trial."""
    by_task = {
        id(t): sum(len(example) for example in t.train) / max(1, len(t.train)) for t in _distinct(tasks.values())
    }
    return {name: by_task[id(task)] for name, task in tasks.items()}
