"""From what was measured to the ranking: who generates, who wins, who is tied, what the study is told."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from plora.config.schema import SweepConfig
from plora.data.types import Task
from plora.engine.recorder import Recorder, values_and_errors
from plora.engine.scoring import Objective, SavedAdapters, Subject, base_subjects
from plora.report.results import TrialSummary, base_summary, leaderboard, summary_of, winner
from plora.search.study import SweepStudy
from plora.search.trial import DEFAULT_TRIAL, Trial
from plora.training.metrics import Score, tied_with_winner
from plora.training.records import VAL_LOSS

log = logging.getLogger(__name__)


class Ranking:
    """The scores of every trial and of the base, and what follows from them. Made when training is over.

    Args:
        config: the sweep's.
        objective: what ranks.
        recorder: what training told.
        tasks: the data of each trial.
    """

    def __init__(
        self, config: SweepConfig, objective: Objective, recorder: Recorder, tasks: Mapping[str, Task]
    ) -> None:
        self._config, self._objective, self._tasks = config, objective, tasks
        self._results = recorder.results
        self._bases = base_subjects(tasks)
        # By subject and by metric; of a diverged trial there are none.
        self._scores = {name: dict(result.scores) for name, result in recorder.results.items()}
        self._scores |= {base.name: dict(recorder.base_scores[base.task.name]) for base in self._bases}
        self._test: dict[str, Score] = {}

    def score_validation(self, saved: SavedAdapters, packs: Sequence[Sequence[str]]) -> None:
        """Let the best by validation loss, default and base generate answers, where the objective judges those.

        Args:
            saved: scores finished trials.
            packs: names of trials that fit the device together.
        """
        if not self._objective.needs_answers:
            return
        chosen, bases = self._generating(), self._bases
        log.info("generating answers on the validation data: %s and the base model", _names(chosen))
        for pack in packs:
            group = [self._subject(trial) for trial in chosen if trial.name in pack]
            if group or bases:
                for name, score in saved.score([*group, *bases], "val").items():
                    self._scores[name][self._objective.name] = score
                bases = []

    def score_test(self, saved: SavedAdapters) -> None:
        """Score winner, default and base on the test data, where the winner has any."""
        best = winner(self.summaries())
        if best is None or not self._tasks[best.name].test:
            return
        chosen = [trial for trial in self.order() if trial.name in (best.name, DEFAULT_TRIAL)]
        log.info("scoring %s and the base model on the test data", _names(chosen))
        subjects = [self._subject(trial) for trial in chosen if self._tasks[trial.name].test]
        subjects += [base for base in self._bases if base.task is self._tasks[best.name]]
        self._test = saved.score(subjects, "test")

    def order(self) -> list[Trial]:
        """Completed trials, best first."""
        by_name = {trial.name: trial for trial in self._config.trials}
        ranked = self.summaries()
        return [by_name[each.name] for each in ranked if each.name in by_name and each.state == "complete"]

    def summaries(self, exported: Mapping[str, Path] | None = None) -> list[TrialSummary]:
        """The leaderboard, the base model in it.

        Args:
            exported: adapter directories by trial name.
        """
        exported = exported or {}
        rows = [self._summary(trial, exported.get(trial.name)) for trial in self._config.trials]
        rows += [
            base_summary(self._scores[base.name], self._objective.name, self._test.get(base.name), base.name)
            for base in self._bases
        ]
        scores = {trial.name: self._scores[trial.name].get(self._objective.name) for trial in self._config.trials}
        known = {name: score for name, score in scores.items() if score is not None}
        tied = tied_with_winner(known, maximize=self._objective.maximize)
        return leaderboard(rows, self._config.objective.direction, tied)

    def tell(self, study: SweepStudy) -> None:
        """Store in the study what became of the trials that it has not been told of when they ended."""
        for trial in self._config.trials:
            result = self._results[trial.name]
            if result.status == "completed" and self._objective.name not in result.scores:
                self._tell(study, trial)

    def _tell(self, study: SweepStudy, trial: Trial) -> None:
        scores = self._scores[trial.name]
        if self._objective.name in scores:
            study.finish(trial.number, scores[self._objective.name].value, *values_and_errors(scores))
        else:
            reason = "not among the best by validation loss, so no answers were generated"
            study.prune(trial.number, reason, values_and_errors(scores)[0])

    def _generating(self) -> list[Trial]:
        assert self._objective.generation is not None, "checked with the configuration"
        completed = [trial for trial in self._config.trials if self._results[trial.name].status == "completed"]
        best_first = sorted(completed, key=self._promise)
        chosen = best_first[: self._objective.generation.top_k]
        return chosen + [trial for trial in best_first if trial.name == DEFAULT_TRIAL and trial not in chosen]

    def _promise(self, trial: Trial) -> tuple[float, float]:
        """The objective, where it was watched, then the validation loss; the lower, the better."""
        scores = self._scores[trial.name]
        sign = -1 if self._objective.maximize else 1
        watched = scores.get(self._objective.name)
        return sign * watched.value if watched else 0.0, scores[VAL_LOSS].value

    def _subject(self, trial: Trial) -> Subject:
        return Subject(trial.name, self._tasks[trial.name], trial)

    def _summary(self, trial: Trial, adapter: Path | None) -> TrialSummary:
        result, name = self._results[trial.name], trial.name
        error = None if result.status == "completed" else f"loss or gradient not finite at step {result.steps}"
        scored = replace(result, scores=self._scores[name])
        return summary_of(scored, self._objective.name, self._test.get(name), adapter, error)


def _names(trials: Sequence[Trial]) -> str:
    return ", ".join(trial.name for trial in trials) or "no trial"
