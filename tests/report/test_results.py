"""The ranking and its tables."""

from __future__ import annotations

import csv
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from plora.modules.config import AdapterConfig
from plora.report.results import (
    TrialSummary,
    base_summary,
    leaderboard,
    settings_of,
    summary_of,
    to_dataframe,
    varying_settings,
    winner,
    write_csv,
)
from plora.search.trial import Trial


def trial(number, objective=None, val_loss=None, state="complete", **fields):
    return TrialSummary(number, f"t{number:03d}", state, objective=objective, val_loss=val_loss, **fields)


def numbers(ranked):
    return [t.number for t in ranked]


@pytest.mark.parametrize(("direction", "order"), [("maximize", [2, 1, 0]), ("minimize", [0, 1, 2])])
def test_order_follows_the_direction(direction, order):
    assert numbers(leaderboard([trial(0, 0.1), trial(1, 0.2), trial(2, 0.3)], direction)) == order


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_unfinished_and_nan_come_last_whatever_their_numbers(direction):
    trials = [
        trial(0, 0.99, state="failed"),
        trial(1, 0.0, state="failed"),
        trial(2, 0.99, state="diverged"),
        trial(3, math.nan, math.nan),
        trial(4, None, 1.5),
        trial(5, None, 1.2),
        trial(6, 0.5, 9.0),
        trial(7, math.inf, 1.0),
    ]
    expected = [6, 7, 5, 4, 3, 2]
    for seed in range(5):
        random.Random(seed).shuffle(trials)
        ranked = leaderboard(trials, direction)
        assert numbers(ranked)[:6] == expected
        assert numbers(ranked)[6:] == ([0, 1] if direction == "maximize" else [1, 0])
        assert winner(ranked).number == 6


def test_equal_objectives_are_ordered_by_loss_then_number():
    trials = [trial(3, 0.5, 1.0), trial(1, 0.5, 2.0), trial(2, 0.5, 1.0), trial(0, 0.5, math.nan)]
    assert numbers(leaderboard(trials, "maximize")) == [2, 3, 1, 0]


def test_the_base_model_is_ranked_but_never_wins():
    base = TrialSummary(None, "base", objective=0.9)
    ranked = leaderboard([trial(1, 0.5), base, trial(2, 0.6)], "maximize")
    assert [t.name for t in ranked] == ["base", "t002", "t001"]
    assert winner(ranked).name == "t002"
    assert winner([base]) is None
    assert winner([base, trial(1, 0.5, state="diverged")]) is None
    assert winner([trial(1)]) is None  # nothing measured


def test_ties_are_marked_except_on_the_winner_and_the_diverged():
    trials = [trial(0, 0.9), trial(1, 0.88), trial(2, 0.5), replace(trial(3, 0.89, state="diverged"), tied=True)]
    ranked = leaderboard(trials, "maximize", tied=["t000", "t001", "t003"])
    assert {t.name: t.tied for t in ranked} == {"t000": False, "t001": True, "t002": False, "t003": False}


def test_an_unknown_direction_is_refused():
    with pytest.raises(ValueError, match="'up'"):
        leaderboard([], "up")


def test_settings_of_a_real_trial_are_flat():
    settings = settings_of(Trial(3, "t003", AdapterConfig(rank=4, seed=9), lr=0.5, seed=7, params={"lr": 0.5}))
    assert (settings["rank"], settings["lr"], settings["seed"]) == (4, 0.5, 7)
    assert not {"adapter", "params", "number", "name"} & settings.keys()


def test_varying_settings_compare_unhashable_values():
    settings = [{"a": 1, "b": {"x": 1}, "c": [1]}, {"a": 1, "b": {"x": 2}, "c": [1]}, {"a": 1, "b": {"x": 1}, "c": [2]}]
    assert varying_settings(settings) == ["b", "c"]
    assert varying_settings(settings[:1]) == []
    assert varying_settings([]) == []


def test_summary_of_a_result(make_trial, make_result, make_eval):
    evals = [make_eval(10, val_loss=1.5), make_eval(20, val_loss=(1.2, 0.1)), make_eval(30, val_loss=math.nan)]
    result = make_result(make_trial(1, rank=32), evals=evals, val_loss=(1.3, 0.1), exact_match=(0.5, math.nan))
    summary = summary_of(result, "exact_match", adapter_dir=Path("a"))
    assert (summary.name, summary.state, summary.settings["rank"]) == ("t001", "complete", 32)
    assert (summary.objective, summary.objective_se, summary.val_loss, summary.val_loss_se) == (0.5, None, 1.3, 0.1)
    assert (summary.best_val_loss, summary.best_step) == (1.2, 20)
    assert summary.test_score is None
    assert summary.tokens_per_second == 200
    tested = summary_of(result, "val_loss", test=make_eval(0, x=(0.4, 0.2)).scores["x"])
    assert (tested.objective, tested.test_score, tested.test_score_se) == (1.3, 0.4, 0.2)
    diverged = summary_of(make_result(make_trial(2), "diverged"), "val_loss", error="NaN")
    assert (diverged.state, diverged.objective, diverged.best_val_loss) == ("diverged", None, None)
    base = base_summary(make_eval(0, val_loss=(2.0, 0.1)).scores, "val_loss")
    assert base.is_base
    assert base.objective == 2.0
    assert base.objective_se == 0.1


def test_csv_has_a_row_per_trial_with_all_settings(tmp_path):
    trials = [
        trial(0, 0.5, settings={"rank": 8, "target": ("q_proj", "v_proj")}, error='a "quoted", text\nin two lines'),
        trial(1, 0.7, settings={"rank": 4, "lr": 1e-3}, tokens=100, seconds=4.0),
        base_summary({}, "val_loss"),
    ]
    write_csv(tmp_path / "results.csv", leaderboard(trials, "maximize"))
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["place"], row["trial"]) for row in rows] == [("1", "t001"), ("2", "t000"), ("3", "base")]
    assert (rows[0]["rank"], rows[0]["lr"], rows[0]["target"], rows[0]["tokens_per_second"]) == (
        "4",
        "0.001",
        "",
        "25.0",
    )
    assert rows[1]["target"] == "q_proj v_proj"
    assert rows[1]["error"] == 'a "quoted", text\nin two lines'
    write_csv(tmp_path / "empty.csv", [])


def test_dataframe_keeps_whole_numbers_whole():
    table = to_dataframe(leaderboard([trial(0, 0.5, settings={"rank": 8}), base_summary({}, "x")], "maximize"))
    assert table["rank"].tolist()[0] == 8
    assert str(table["rank"].dtype) == "Int64"
    assert table["objective"][0] == 0.5
    assert table["number"].isna().tolist() == [False, True]


def test_reports_need_no_torch():
    code = "import sys, plora.report; sys.exit('torch' in sys.modules or 'torchtune' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_summary_of_what_training_returns():
    from plora.training.metrics import Score
    from plora.training.records import EvalRecord, TrialResult

    scores = {"val_loss": Score.mean([1.0, 2.0]), "exact_match": Score.mean([1.0])}
    evals = (EvalRecord(5, 10, "dataset", {"val_loss": Score.mean([1.0])}), EvalRecord(10, 10, "dataset", scores))
    real = Trial(1, "t001", AdapterConfig(rank=4), params={"rank": 4})
    summary = summary_of(TrialResult(real, "completed", 10, 10, 500, 2.0, 0.9, scores, evals), "exact_match")
    assert (summary.state, summary.objective, summary.objective_se, summary.params) == (
        "complete",
        1.0,
        None,
        {"rank": 4},
    )
    assert (summary.val_loss, summary.val_loss_se, summary.best_val_loss, summary.best_step) == (1.5, 0.5, 1.0, 5)
    diverged = summary_of(TrialResult(real, "diverged", 3, 10, 50, 1.0, math.nan), "exact_match")
    assert diverged.state == "diverged"
    assert diverged.objective is None
