"""What came of each trial, and the ranking of all of them."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from plora.checkpoint.atomic import atomic_file
from plora.report.listener import Score

if TYPE_CHECKING:
    import pandas

BASE = "base"
"""Name under which the base model, without any adapter, stands in the ranking."""

DEFAULT = "default"
"""Name of the trial that the configuration's ``trial`` section describes."""

STATES = ("complete", "diverged", "failed")
DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True)
class TrialSummary:
    """A finished trial as reports see it: plain values, no tensors.

    Args:
        number: the trial's number in the study; None for the base model.
        name: the trial's name; the base model's is ``"base"``, with the data set's where a sweep has several.
        state: ``complete``, ``diverged`` (its loss or gradient stopped being finite) or ``failed``.
        params: the settings that the search chose.
        settings: every setting of the trial (see ``settings_of``).
        steps: optimizer steps taken.
        tokens: tokens trained on.
        seconds: wall-clock from its first step to its end, shared with the others of its pack.
        val_loss: validation loss at the end, in nats a token.
        val_loss_se: its standard error.
        best_val_loss: the lowest validation loss on the way.
        best_step: the step of ``best_val_loss``.
        objective: what the sweep optimises; None where it was not measured for this trial.
        objective_se: its standard error.
        test_score: the objective on the test split, for those scored there.
        test_score_se: its standard error.
        tied: whether ``objective`` cannot be told from the winner's (set by ``leaderboard``).
        adapter_dir: the exported adapter.
        error: why it failed or where it diverged.
    """

    number: int | None
    name: str
    state: str = "complete"
    params: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    val_loss: float | None = None
    val_loss_se: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    objective: float | None = None
    objective_se: float | None = None
    test_score: float | None = None
    test_score_se: float | None = None
    tied: bool = False
    adapter_dir: Path | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        assert self.state in STATES, self.state

    @property
    def is_base(self) -> bool:
        """Whether this is the base model itself."""
        return self.number is None

    @property
    def tokens_per_second(self) -> float | None:
        """Its own training tokens a second of its pack's time."""
        return self.tokens / self.seconds if self.seconds > 0 else None


def state_of(result: Any) -> str:
    """The state, in this module's words, of a ``plora.training.records.TrialResult``."""
    return "complete" if result.status == "completed" else str(result.status)


def summary_of(
    result: Any, objective: str, test: Score | None = None, adapter_dir: Path | None = None, error: str | None = None
) -> TrialSummary:
    """Sums up a ``plora.training.records.TrialResult``.

    Args:
        result: how the trial ended.
        objective: name of the score that the sweep optimises, such as ``val_loss``.
        test: that score on the test split, if it was taken.
        adapter_dir: where the adapter was exported to.
        error: what went wrong.
    """
    losses = [(record.scores["val_loss"].value, record.step) for record in result.evals if "val_loss" in record.scores]
    best_loss, best_step = min(((x, step) for x, step in losses if math.isfinite(x)), default=(None, None))
    return TrialSummary(
        number=result.trial.number,
        name=result.trial.name,
        state=state_of(result),
        params=dict(result.trial.params),
        settings=settings_of(result.trial),
        steps=result.steps,
        tokens=result.tokens,
        seconds=result.seconds,
        best_val_loss=best_loss,
        best_step=best_step,
        adapter_dir=adapter_dir,
        error=error,
        **_score_fields(result.scores, objective, test),
    )


def base_summary(
    scores: Mapping[str, Score], objective: str, test: Score | None = None, name: str = BASE
) -> TrialSummary:
    """The base model's place among the trials; ``name`` tells it apart on several data sets."""
    return TrialSummary(number=None, name=name, **_score_fields(scores, objective, test))


def title_of(trial: TrialSummary) -> str:
    """What readers know it as: the trial's name, or ``base model`` (and on which data set, where there are several)."""
    if not trial.is_base:
        return trial.name
    return "base model" + trial.name.removeprefix(BASE).replace("-", " on ", 1)


def _score_fields(scores: Mapping[str, Score], objective: str, test: Score | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    measured = {"val_loss": scores.get("val_loss"), "objective": scores.get(objective), "test_score": test}
    for name, score in measured.items():
        if score is not None:
            stderr = score.stderr if math.isfinite(score.stderr) else None
            fields |= {name: score.value, f"{name}_se": stderr}
    return fields


def settings_of(trial: Any) -> dict[str, Any]:
    """All settings of a ``plora.search.trial.Trial`` in one flat mapping, the adapter's own included."""
    assert is_dataclass(trial)
    assert not isinstance(trial, type)
    flat = asdict(trial)
    adapter = flat.pop("adapter")
    adapter.pop("seed", None)  # the trial's seed is the one that people set
    for key in ("number", "name", "params"):
        flat.pop(key)
    return {**adapter, **flat}


def varying_settings(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the settings in which trials differ, in the order in which they first appear."""
    values: dict[str, set[str]] = {}
    for one in settings:
        for key, value in one.items():
            values.setdefault(key, set()).add(repr(value))
    return [key for key, seen in values.items() if len(seen) > 1]


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether there is a finite value."""
    return value is not None and math.isfinite(value)


def leaderboard(summaries: Iterable[TrialSummary], direction: str, tied: Collection[str] = ()) -> list[TrialSummary]:
    """Best first, with the trials marked that cannot be told from the winner.

    Complete trials come before diverged ones and those before failed ones; among the complete, those with an
    objective before those that only have a validation loss. Equal objectives are ordered by validation loss, then
    by number.

    Args:
        summaries: the trials and the base model.
        direction: ``maximize`` or ``minimize`` the objective.
        tied: names of those within noise of the winner, as found by whoever has the single examples' scores.

    Raises:
        ValueError: for another direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be maximize or minimize, got {direction!r}")
    sign = -1.0 if direction == "maximize" else 1.0

    def key(trial: TrialSummary) -> tuple[Any, ...]:
        objective = sign * trial.objective if is_number(trial.objective) else math.inf
        val_loss = trial.val_loss if is_number(trial.val_loss) else math.inf
        number = -1 if trial.number is None else trial.number
        return STATES.index(trial.state), objective, val_loss, number, trial.name

    ranked = sorted(summaries, key=key)
    best = winner(ranked)
    return [
        replace(trial, tied=trial.name in tied and trial is not best and trial.state == "complete") for trial in ranked
    ]


def winner(ranked: Sequence[TrialSummary]) -> TrialSummary | None:
    """The best adapter of a ranking: its first complete entry with a score that is not the base model."""
    for trial in ranked:
        if (
            trial.state == "complete"
            and not trial.is_base
            and (is_number(trial.objective) or is_number(trial.val_loss))
        ):
            return trial
    return None


def table_rows(ranked: Sequence[TrialSummary]) -> list[dict[str, Any]]:
    """One flat record a trial, best first: ``results.csv``'s columns, the settings' after the results'."""
    names: dict[str, None] = {}
    for trial in ranked:
        names |= dict.fromkeys(trial.settings)
    return [_row(place, trial, names) for place, trial in enumerate(ranked, start=1)]


def _row(place: int, trial: TrialSummary, setting_names: Iterable[str]) -> dict[str, Any]:
    row = {
        "place": place,
        "trial": trial.name,
        "number": trial.number,
        "state": trial.state,
        "tied": trial.tied,
        "objective": trial.objective,
        "objective_se": trial.objective_se,
        "val_loss": trial.val_loss,
        "val_loss_se": trial.val_loss_se,
        "best_val_loss": trial.best_val_loss,
        "best_step": trial.best_step,
        "test_score": trial.test_score,
        "test_score_se": trial.test_score_se,
        "steps": trial.steps,
        "tokens": trial.tokens,
        "seconds": trial.seconds,
        "tokens_per_second": trial.tokens_per_second,
    }
    for name in setting_names:
        assert name not in row, f"the setting {name!r} has the name of a result"
        row[name] = _cell(trial.settings.get(name))
    row["adapter_dir"] = None if trial.adapter_dir is None else str(trial.adapter_dir)
    row["error"] = trial.error
    return row


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item}" for key, item in value.items()) or None
    return value


def write_csv(path: str | Path, ranked: Sequence[TrialSummary]) -> None:
    """Writes the ranking as CSV, atomically; an unknown value is an empty cell."""
    rows = table_rows(ranked)
    with atomic_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def to_dataframe(ranked: Sequence[TrialSummary]) -> pandas.DataFrame:
    """The ranking as a pandas table, with the columns of ``results.csv``."""
    import pandas

    rows = table_rows(ranked)
    table = pandas.DataFrame(rows)
    for name in table.columns.astype(str):
        known = [row[name] for row in rows if row[name] is not None]
        if known and all(type(value) is int for value in known):
            table[name] = table[name].astype("Int64")  # or one missing value would turn ranks into 8.0
    return table
