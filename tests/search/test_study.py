from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from plora.config import load
from plora.modules.config import AdapterConfig
from plora.search.study import SweepStudy, create_study, open_study, stored_distributions
from plora.search.trial import Trial


def started(tmp_path: Path, search: dict[str, Any], **trial: Any) -> tuple[SweepStudy, tuple[Trial, ...]]:
    raw = {
        "output_dir": str(tmp_path / "sweep"), "model": {"source": "m"}, "dataset": {"source": "d"},
        "trial": trial, "search": search,
    }  # fmt: skip
    config = load(raw)
    study = create_study(tmp_path, config.trials, config.search.space, metric="val_loss", direction="minimize")
    return study, config.trials


SPACE = {
    "n_trials": 4,
    "space": {"lr": {"low": 1e-4, "high": 1e-3, "log": True}, "rank": [8, 32], "betas": [[0.9, 0.99], [0.9, 0.95]]},
}


def test_a_study_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    config = {"output_dir": str(tmp_path), "model": {"source": "m"}, "dataset": {"source": "d"}}
    trials = load(config, ["search.trials=[{lr: 1e-3}]"]).trials
    with pytest.raises(ValueError, match=r"missing/study\.db cannot be written: unable to open"):
        create_study(tmp_path / "missing", trials, {}, metric="val_loss", direction="minimize")


def test_the_study_reopens_with_everything_in_it(tmp_path: Path) -> None:
    study, trials = started(tmp_path, SPACE)
    for trial in trials:
        study.report(trial.number, 5, 2.0)
        study.report(trial.number, 10, 1.0 + trial.number)
    study.finish(0, 1.5, {"val_loss": 1.5, "exact_match": 0.25}, {"exact_match": 0.1})
    study.finish(1, math.nan, {"val_loss": math.nan}, {})
    study.fail(2, "out of memory")
    study.close()

    again = open_study(tmp_path)
    assert again.direction.name == "MINIMIZE"
    assert again.metric_names == ["val_loss"]
    assert again.study_name == tmp_path.name
    stored = again.trials
    assert [trial.params for trial in stored] == [dict(trial.params) for trial in trials]
    assert [trial.user_attrs["name"] for trial in stored] == ["default", "t001", "t002", "t003"]
    assert [trial.state for trial in stored] == [
        TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING,
    ]  # fmt: skip
    assert stored[0].intermediate_values == {5: 2.0, 10: 1.0}
    assert stored[0].user_attrs["scores"] == {"val_loss": 1.5, "exact_match": 0.25}
    assert stored[0].user_attrs["standard_errors"] == {"exact_match": 0.1}
    assert stored[1].user_attrs["reason"] == "the objective is nan"
    assert stored[2].user_attrs["reason"] == "out of memory"
    assert again.best_trial.number == 0


def test_a_study_is_never_overwritten(tmp_path: Path) -> None:
    _, trials = started(tmp_path, SPACE)
    with pytest.raises(ValueError, match="already exists"):
        create_study(tmp_path, trials, {}, metric="val_loss", direction="minimize")
    with pytest.raises(ValueError, match="has no study"):
        open_study(tmp_path / "elsewhere")


def test_defaults_outside_the_space_are_stored_where_they_can_be(tmp_path: Path) -> None:
    search = {
        "n_trials": 3,
        "space": {
            "lr": {"low": 1e-4, "high": 1e-3, "log": True},
            "weight_decay": {"low": 1e-4, "high": 1e-1, "log": True},
            "max_grad_norm": {"low": 0.1, "high": 1.0},
            "rank": {"low": 8, "high": 32, "step": 8},
            "schedule": ["cosine", "linear"],
        },
    }
    started(tmp_path, search, lr=0.5, rank=3, schedule="constant", max_grad_norm=None)
    default, *others = open_study(tmp_path).trials
    assert default.params == {"lr": 0.5, "rank": 3, "schedule": "constant"}
    for trial in others:
        assert set(trial.params) == set(search["space"])
        assert trial.params["rank"] in (8, 16, 24, 32)
        assert trial.params["schedule"] in ("cosine", "linear")


def test_an_explicit_list_is_stored(tmp_path: Path) -> None:
    entries = [{"lr": 1e-3}, {"target_modules": ["q_proj"]}, {"max_grad_norm": None, "rank": 4}]
    started(tmp_path, {"trials": entries})
    stored = open_study(tmp_path).trials
    assert stored[0].params == {"lr": 2e-4, "rank": 16, "target_modules": "all-linear", "max_grad_norm": 1.0}
    assert stored[2].params["target_modules"] == '["q_proj"]'
    assert stored[3].params["max_grad_norm"] is None
    assert isinstance(stored[1].distributions["lr"], FloatDistribution)
    assert isinstance(stored[1].distributions["rank"], IntDistribution)


SPACES = st.sampled_from(
    [
        FloatDistribution(1e-4, 1e-2, log=True),
        FloatDistribution(0.0, 1.0, step=0.25),
        FloatDistribution(0.0, 1.0),
        IntDistribution(2, 8, step=2),
        IntDistribution(1, 8, log=True),
        CategoricalDistribution([1, None, "a"]),
    ]
)
VALUES = st.none() | st.integers(-5, 20) | st.floats(-5, 20)


@settings(deadline=None)
@given(SPACES, st.lists(VALUES, max_size=4))
def test_stored_distributions_hold_what_was_asked_for(space: Any, values: list[Any]) -> None:
    if isinstance(space, IntDistribution):
        values = [value for value in values if not isinstance(value, float)]
    trials = [Trial(i, f"t{i:03d}", AdapterConfig(), params={"x": value}) for i, value in enumerate(values)]
    stored = stored_distributions({"x": space}, trials)["x"]
    assert type(stored) is type(space)
    for value in values:
        numeric = not isinstance(space, CategoricalDistribution)
        if numeric and (value is None or (space.log and value <= 0)):
            continue
        assert stored._contains(stored.to_internal_repr(value))
