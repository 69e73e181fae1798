from __future__ import annotations

import dataclasses
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora.config.mistakes import Findings
from plora.search.samplers import drawn_trials, list_trials, make_sampler
from plora.search.settings import DEFAULTS, merge
from plora.search.space import parse_space
from plora.search.trial import Trial

DEFAULT = {**DEFAULTS, "seed": 0, "dataset": "dataset"}


def draw(
    raw: dict[str, Any], sampler: str = "random", n_trials: int | None = 6, seed: int = 0, **default: Any
) -> tuple[list[Trial], Findings]:
    findings = Findings()
    space = parse_space(raw, "space", findings)
    made = make_sampler(sampler, {}, space, seed, findings)
    assert made is not None
    assert not findings.mistakes
    return drawn_trials(merge(DEFAULT, default), space, made, n_trials, findings), findings


def settings_of(trial: Trial) -> Trial:
    return dataclasses.replace(trial, number=0, name="", params={})


@pytest.mark.parametrize("sampler", ["random", "grid", "optuna.samplers.TPESampler"])
def test_draws_repeat_with_the_seed_and_differ_without(sampler: str) -> None:
    raw = {
        "lr": [1e-5, 3e-5, 1e-4, 3e-4],
        "rank": {"low": 4, "high": 64, "step": 4},
        "betas": [[0.9, 0.99], [0.9, 0.95]],
    }
    first, again, other = (draw(raw, sampler, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert [trial.params for trial in first] != [trial.params for trial in other]


def test_every_setting_can_be_searched_and_arrives() -> None:
    raw = {
        "lr": [3e-3], "rank": [5], "alpha": [7.0], "dropout": [0.25], "batch_size": [3], "max_steps": [11],
        "warmup_steps": [2], "schedule": ["linear"], "weight_decay": [0.5], "betas": [[0.8, 0.7]], "eps": [1e-3],
        "max_grad_norm": [None], "target_modules": [["v_proj", "k_proj"]], "rslora": [True], "loraplus_ratio": [4],
        "seed": [9], "dataset": ["other"], "dataset.max_examples": [13], "dataset.split": ["[train]"],
    }  # fmt: skip
    (default, trial), _ = draw(raw, n_trials=2)
    assert default.adapter.rank == 16
    assert trial.adapter.rank == 5
    assert trial.adapter.alpha == 7.0
    assert trial.adapter.dropout == 0.25
    assert trial.adapter.target_modules == ("k_proj", "v_proj")
    assert trial.adapter.rslora is True
    assert trial.adapter.seed == trial.seed == 9
    assert (trial.lr, trial.batch_size, trial.schedule, trial.weight_decay) == (3e-3, 3, "linear", 0.5)
    assert (trial.epochs, trial.max_steps, trial.warmup_steps) == (None, 11, 2)
    assert (trial.betas, trial.eps, trial.max_grad_norm, trial.loraplus_ratio) == ((0.8, 0.7), 1e-3, None, 4.0)
    assert (trial.dataset, trial.dataset_options) == ("other", {"max_examples": 13, "split": "[train]"})


def test_grid_is_whole_and_holds_the_default_once() -> None:
    trials, findings = draw({"rank": [8, 16], "lr": [2e-4, 1e-3]}, "grid", n_trials=None)
    assert {(trial.adapter.rank, trial.lr) for trial in trials} == {(8, 2e-4), (8, 1e-3), (16, 2e-4), (16, 1e-3)}
    assert len(trials) == 4
    assert (trials[0].name, trials[0].adapter.rank, trials[0].lr) == ("default", 16, 2e-4)
    assert not findings.warnings
    assert len(draw({"rank": [8, 32]}, "grid", n_trials=None)[0]) == 3


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 256), min_size=1, max_size=4, unique=True),
    rates=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=3, unique=True),
    sampler=st.sampled_from(["random", "grid"]),
    n_trials=st.integers(1, 8),
)
def test_trials_are_numbered_named_and_all_different(
    ranks: list[int], rates: list[float], sampler: str, n_trials: int
) -> None:
    trials, findings = draw({"rank": ranks, "lr": rates}, sampler, n_trials)
    combinations = {(16, 2e-4)} | {(rank, rate) for rank in ranks for rate in rates}
    assert len(trials) == min(n_trials, len(combinations))
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert len({trial.name for trial in trials}) == len(trials)
    assert len({repr(settings_of(trial)) for trial in trials}) == len(trials)
    assert any("different trials" in warning for warning in findings.warnings) == (len(trials) < n_trials)


def test_a_sampler_that_cannot_draw_is_a_mistake() -> None:
    class Broken(optuna.samplers.RandomSampler):
        def sample_independent(self, *_: Any) -> Any:
            raise ModuleNotFoundError("No module named 'scipy'")

    findings = Findings()
    space = parse_space({"rank": [1, 2]}, "space", findings)
    drawn_trials(DEFAULT, space, Broken(), 3, findings)
    assert "Broken cannot draw from this space: No module named 'scipy'" in findings.mistakes[0].advice


def test_a_huge_grid_is_refused() -> None:
    findings = Findings()
    space = parse_space({"rank": {"low": 1, "high": 256}, "batch_size": {"low": 1, "high": 256}}, "space", findings)
    assert make_sampler("grid", {}, space, 0, findings) is None
    assert "6.55e+04 combinations" in findings.mistakes[0].advice
    # Not listed on the way: no memory would hold it, even beside a range that has no list.
    for lr in ([1e-3], {"low": 0.1, "high": 0.2}):
        findings = Findings()
        space = parse_space({"dataset.seed": {"low": 1, "high": 10**15}, "lr": lr}, "search.space", findings)
        assert make_sampler("grid", {}, space, 0, findings) is None
        assert "1e+15 combinations" in str(findings.mistakes[0])


def test_listed_trials_change_the_default() -> None:
    findings = Findings()
    entries = [{"lr": 1e-3}, {"rank": 4, "alpha": 4.0}, {"lr": 2e-4, "rank": 16}]
    trials = list_trials(DEFAULT, entries, findings)
    assert [trial.name for trial in trials] == ["default", "t001", "t002", "t003"]
    assert trials[2].adapter.alpha == 4.0
    assert trials[2].lr == 2e-4
    assert trials[1].params == {"alpha": None, "lr": 1e-3, "rank": 16}
    (mistake,) = findings.mistakes  # the last entry says what the default says
    assert mistake.path == "search.trials[2]"


def test_optunas_verbosity_is_put_back() -> None:
    before = optuna.logging.get_verbosity()
    draw({"rank": [1, 2, 3]})
    assert optuna.logging.get_verbosity() == before
