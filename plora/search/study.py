"""The sweep's Optuna study in an SQLite file, which ``optuna-dashboard`` opens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from plora.search.samplers import quiet_optuna
from plora.search.space import is_multiple
from plora.search.trial import Trial

STUDY_FILE = "study.db"
_LOCK_TIMEOUT_S = 60


class SweepStudy:
    """A study whose trials were all asked for up front, and are told as they end.

    Args:
        study: the Optuna study.
        asked: its running trials, by number.
        storage: what it is stored in.
    """

    def __init__(self, study: optuna.Study, asked: Mapping[int, optuna.Trial], storage: RDBStorage) -> None:
        self.study = study
        self._asked = dict(asked)
        self._storage = storage

    def report(self, number: int, step: int, value: float) -> None:
        """Store an intermediate value of trial ``number``: its validation loss after ``step`` optimizer steps."""
        self._asked[number].report(float(value), step)

    def finish(
        self, number: int, value: float, scores: Mapping[str, float], standard_errors: Mapping[str, float]
    ) -> None:
        """Store the result of trial ``number``. A value that is not finite fails it.

        Args:
            number: of the trial.
            value: of the objective.
            scores: every metric measured, by name.
            standard_errors: of those scores that have one.
        """
        if not math.isfinite(value):
            self.fail(number, f"the objective is {value}", scores)
            return
        trial = self._asked.pop(number)
        trial.set_user_attr("scores", _plain(scores))
        trial.set_user_attr("standard_errors", _plain(standard_errors))
        with quiet_optuna():
            self.study.tell(trial, float(value))

    def fail(self, number: int, reason: str, scores: Mapping[str, float] | None = None) -> None:
        """Mark trial ``number`` as failed, with the reason."""
        trial = self._asked.pop(number)
        trial.set_user_attr("reason", reason)
        if scores:
            trial.set_user_attr("scores", _plain(scores))
        with quiet_optuna():
            self.study.tell(trial, state=TrialState.FAIL)

    def prune(self, number: int, reason: str, scores: Mapping[str, float]) -> None:
        """Mark trial ``number`` as trained but not measured by the objective, with the reason."""
        trial = self._asked.pop(number)
        trial.set_user_attr("reason", reason)
        trial.set_user_attr("scores", _plain(scores))
        with quiet_optuna():
            self.study.tell(trial, state=TrialState.PRUNED)

    def close(self) -> None:
        """Let go of the file."""
        self._storage.remove_session()
        self._storage.engine.dispose()


def create_study(
    output_dir: Path,
    trials: Sequence[Trial],
    space: Mapping[str, BaseDistribution],
    *,
    metric: str,
    direction: Literal["minimize", "maximize"],
) -> SweepStudy:
    """A new study, named after ``output_dir``, with every one of ``trials`` running.

    Args:
        output_dir: an existing directory without a study.
        trials: numbered from 0 on; ``trials[0]`` is the default.
        space: what was searched; empty for an explicit list.
        metric: name of the objective.
        direction: ``minimize`` or ``maximize``.

    Raises:
        ValueError: if the directory already has a study, or it cannot be written.
    """
    path = output_dir / STUDY_FILE
    if path.exists():
        raise ValueError(f"{path} already exists: choose another output_dir")
    distributions = stored_distributions(space, trials)
    try:
        return _create(output_dir.resolve().name, path, distributions, trials, metric, direction)
    except (SQLAlchemyError, StorageInternalError) as error:  # such as a full disk
        raise ValueError(f"{path} cannot be written: {getattr(error, 'orig', None) or error}") from error


def _create(
    name: str,
    path: Path,
    distributions: Mapping[str, BaseDistribution],
    trials: Sequence[Trial],
    metric: str,
    direction: Literal["minimize", "maximize"],
) -> SweepStudy:
    storage = _storage(path)
    with quiet_optuna():
        study = optuna.create_study(study_name=name, storage=storage, direction=direction)
        study.set_metric_names([metric])
        for trial in trials:
            study.enqueue_trial(_storable(trial, distributions), user_attrs={"name": trial.name})
        asked = {}
        for trial in trials:
            running = study.ask({name: distributions[name] for name in _storable(trial, distributions)})
            assert running.number == trial.number, (running.number, trial.number)
            asked[trial.number] = running
    return SweepStudy(study, asked, storage)


def open_study(output_dir: Path) -> optuna.Study:
    """The study of an existing sweep, to look at.

    Raises:
        ValueError: if the directory has none.
    """
    path = output_dir / STUDY_FILE
    if not path.exists():
        raise ValueError(f"{output_dir} has no {STUDY_FILE}: it is not the output of a sweep")
    with quiet_optuna():
        return optuna.load_study(study_name=None, storage=_storage(path))


def stored_distributions(space: Mapping[str, BaseDistribution], trials: Sequence[Trial]) -> dict[str, BaseDistribution]:
    """The distributions to store: those of ``space``, wide enough for the default trial's values too.

    For an explicit list, whose space is empty, they are made from the listed values.
    """
    values: dict[str, list[Any]] = {name: [] for name in space}
    for trial in trials:
        for name, value in trial.params.items():
            values.setdefault(name, []).append(value)
    return {
        name: _widened(space[name], found) if name in space else _distribution_of(found)
        for name, found in values.items()
    }


def _distribution_of(values: Sequence[Any]) -> BaseDistribution:
    # Numbers as a range rather than a category, so that the dashboard's plots put them on an axis.
    if all(_is_number(value) for value in values):
        if all(isinstance(value, int) for value in values):
            return IntDistribution(min(values), max(values))
        return FloatDistribution(min(values), max(values))
    return CategoricalDistribution(list(dict.fromkeys(values)))


def _widened(distribution: BaseDistribution, values: Sequence[Any]) -> BaseDistribution:
    if isinstance(distribution, CategoricalDistribution):
        return CategoricalDistribution(list(dict.fromkeys([*distribution.choices, *values])))
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    numbers = [value for value in values if _is_number(value) and (value > 0 or not distribution.log)]
    if all(_holds(distribution, value) for value in numbers):
        return distribution
    low, high = min([distribution.low, *numbers]), max([distribution.high, *numbers])
    if isinstance(distribution, IntDistribution):
        return IntDistribution(int(low), int(high), log=distribution.log)
    return FloatDistribution(low, high, log=distribution.log)


def _storable(trial: Trial, distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Those params of ``trial`` that their distributions can hold: no null in a range, no zero in a log range."""
    return {name: value for name, value in trial.params.items() if _holds(distributions[name], value)}


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if not _is_number(value) or not distribution.low <= value <= distribution.high:
        return False
    return distribution.step is None or is_multiple(value - distribution.low, distribution.step)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _storage(path: Path) -> RDBStorage:
    # Trackers and the dashboard may read while the sweep writes.
    options = {"connect_args": {"timeout": _LOCK_TIMEOUT_S}}
    return RDBStorage(f"sqlite:///{path.resolve()}", engine_kwargs=options)


def _plain(values: Mapping[str, float]) -> dict[str, float]:
    """Those that JSON can hold."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
