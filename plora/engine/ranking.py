"""From what was measured to the ranking: who generates, who wins, who is tied, what the study is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plora.config.schema import SweepConfig
from plora.data.types import Task
from plora.engine.recorder import Recorder
from plora.engine.scoring import Objective, SavedAdapters, Subject, base_subjects
from plora.report.results import TrialSummary, leaderboard, settings_of
from plora.search.study import SweepStudy
from plora.search.trial import DEFAULT_TRIAL, Trial
from plora.training.metrics import Score, tied_with_winner
from plora.training.records import VAL_LOSS, TrialResult


class Ranking:
    """The objective of every trial and of the base, and what follows from it.

    Args:
        config: the sweep's.
        objective: what ranks.
        recorder: what training told.
        tasks: the data of each trial.
    """

    def __init__(
        self, config: SweepConfig, objective: Objective, recorder: Recorder, tasks: Mapping[str, Task]
    ) -> None:
        self._config, self._objective, self._recorder, self._tasks = config, objective, recorder, tasks
        self._bases = base_subjects(tasks)
        self._scores: dict[str, Score] = {}
        self._test: dict[str, Score] = {}

    def score_validation(self, saved: SavedAdapters, packs: Sequence[Sequence[str]]) -> None:
        """Find every trial's objective, generating answers for the best by validation loss, default and base.

        Args:
            saved: scores finished trials.
            packs: names of trials that fit the device together.
        """
        if not self._objective.needs_generation:
            self._take_job_scores()
            return
        chosen = self._generating()
        bases = self._bases
        for names in packs:
            group = [self._subject(trial) for trial in chosen if trial.name in names]
            if group or bases:
                self._scores |= saved.score([*group, *bases], "val")
                bases = []

    def score_test(self, saved: SavedAdapters) -> None:
        """Score winner, default and base on the test data, where there is any."""
        order = self.order()
        if not order:
            return
        winner = order[0]
        chosen = [winner, *(trial for trial in order[1:] if trial.name == DEFAULT_TRIAL)]
        subjects = [self._subject(trial) for trial in chosen]
        subjects += [base for base in self._bases if base.task is self._tasks[winner.name]]
        subjects = [subject for subject in subjects if subject.task.test]
        if subjects:
            self._test = saved.score(subjects, "test")

    def order(self) -> list[Trial]:
        """Completed trials, best first."""
        by_name = {trial.name: trial for trial in self._config.trials}
        return [by_name[s.name] for s in self.summaries({}) if s.name in by_name and s.state == "complete"]

    def summaries(self, exported: Mapping[str, Path]) -> list[TrialSummary]:
        """The leaderboard, the base model in it."""
        rows = [self._summary(trial, exported.get(trial.name)) for trial in self._config.trials]
        rows += [self._base_summary(base) for base in self._bases]
        adapters = {name: score for name, score in self._scores.items() if name in self._tasks}
        tied = tied_with_winner(adapters, maximize=self._objective.maximize)
        return leaderboard(rows, self._config.objective.direction, tied)

    def tell(self, study: SweepStudy, trial: Trial) -> None:
        """Store a trial's outcome in the study."""
        result = self._recorder.results[trial.name]
        score = self._scores.get(trial.name)
        measured = {**result.scores, **({self._objective.name: score} if score else {})}
        values = {name: each.value for name, each in measured.items()}
        if result.status != "completed":
            study.fail(trial.number, f"{result.status} after {result.steps} steps", values)
        elif score is None:
            study.prune(trial.number, "not among the best by validation loss, so no answers were generated", values)
        else:
            study.finish(trial.number, score.value, values, {name: each.stderr for name, each in measured.items()})

    def _take_job_scores(self) -> None:
        name = self._objective.name
        for trial, result in self._recorder.results.items():
            if name in result.scores:
                self._scores[trial] = result.scores[name]
        for base in self._bases:
            self._scores[base.name] = self._recorder.base_scores[base.task.name][name]

    def _generating(self) -> list[Trial]:
        assert self._objective.generation is not None
        completed = [trial for trial in self._config.trials if self._result(trial).status == "completed"]
        by_loss = sorted(completed, key=lambda trial: _ascending(self._result(trial).scores[VAL_LOSS].value))
        chosen = by_loss[: self._objective.generation.top_k]
        return chosen + [trial for trial in by_loss if trial.name == DEFAULT_TRIAL and trial not in chosen]

    def _subject(self, trial: Trial) -> Subject:
        return Subject(trial.name, self._tasks[trial.name], trial)

    def _result(self, trial: Trial) -> TrialResult:
        return self._recorder.results[trial.name]

    def _summary(self, trial: Trial, adapter: Path | None) -> TrialSummary:
        result = self._result(trial)
        losses = [
            (each.scores[VAL_LOSS].value, each.step)
            for each in result.evals
            if VAL_LOSS in each.scores and math.isfinite(each.scores[VAL_LOSS].value)
        ]
        best, best_step = min(losses, default=(None, None))
        diverged = result.status != "completed"
        return TrialSummary(
            number=trial.number,
            name=trial.name,
            state="diverged" if diverged else "complete",
            params=trial.params,
            settings=settings_of(trial),
            steps=result.steps,
            tokens=result.tokens,
            seconds=result.seconds,
            best_val_loss=best,
            best_step=best_step,
            adapter_dir=adapter,
            error=f"loss or gradient not finite at step {result.steps}" if diverged else None,
            **self._measured(trial.name, result.scores.get(VAL_LOSS)),
        )

    def _base_summary(self, base: Subject) -> TrialSummary:
        scores = self._recorder.base_scores.get(base.task.name, {})
        return TrialSummary(number=None, name=base.name, **self._measured(base.name, scores.get(VAL_LOSS)))

    def _measured(self, name: str, val_loss: Score | None) -> dict[str, Any]:
        pairs = {"val_loss": val_loss, "objective": self._scores.get(name), "test_score": self._test.get(name)}
        return {
            key: value
            for field, score in pairs.items()
            if score is not None
            for key, value in ((field, score.value), (f"{field}_se", score.stderr))
        }


def _ascending(loss: float) -> float:
    """A key that puts what is not a number last."""
    return loss if math.isfinite(loss) else math.inf
