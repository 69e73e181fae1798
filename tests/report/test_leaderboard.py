"""The ranking as printed."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from plora.report.info import SweepInfo
from plora.report.leaderboard import notes, print_leaderboard, verdict
from plora.report.results import TrialSummary, leaderboard

INFO = SweepInfo("dates", Path("runs/dates"), "org/base", "abc", "exact_match", "maximize", 10_000, 5.0, 8.0)


def trial(number, objective, rank=8, name=None, **fields):
    error = None if objective is None else 0.0125
    fields = {
        "state": "complete",
        "steps": 100,
        "adapter_dir": Path(f"runs/dates/trials/t{number:03d}/adapter"),
        **fields,
    }
    settings = {"rank": rank, "lr": 2e-4}
    return TrialSummary(
        number,
        name or f"t{number:03d}",
        settings=settings,
        objective=objective,
        objective_se=error,
        val_loss=1.5,
        **fields,
    )


@pytest.fixture
def ranked():
    trials = [
        trial(0, 0.5, name="default", test_score=0.475, test_score_se=0.025),
        trial(1, 0.8, rank=12, test_score=0.775, test_score_se=0.025),
        trial(2, 0.79, rank=4),
        trial(3, None, rank=64, state="diverged"),
        TrialSummary(None, "base", objective=0.25, objective_se=0.0125, val_loss=2.5, test_score=0.225),
    ]
    return leaderboard(trials, "maximize", tied=["t001", "t002"])


def printed(ranked, info=INFO, width=130, **options):
    out = io.StringIO()
    print_leaderboard(ranked, info, Console(file=out, width=width), **options)
    return out.getvalue()


def test_rows_with_marks_scores_and_errors(ranked):
    rows = {line.split()[0]: line for line in printed(ranked).splitlines() if line.strip()[:1].isdigit()}
    assert rows["1"].split() == [
        "1",
        "★",
        "t001",
        "12",
        "0.8000",
        "±",
        "0.0125",
        "1.5000",
        "0.7750",
        "±",
        "0.0250",
        "100",
        "complete",
    ]
    assert rows["2"].split()[:4] == ["2", "≈", "t002", "4"]
    assert "default" in rows["3"]
    assert "base model" in rows["4"]
    assert "no adapter" in rows["4"]
    assert rows["5"].split()[1] == "t003"
    assert rows["5"].split()[-1] == "diverged"


def test_a_setting_that_all_share_takes_no_column(ranked):
    header = next(line for line in printed(ranked).splitlines() if "trial" in line and "steps" in line)
    assert "rank" in header
    assert " lr " not in header
    assert "exact_match ↑" in header


def test_names_the_best_adapter_and_how_to_load_it(ranked):
    text = printed(ranked, width=60)  # narrower than the commands, which must stay in one line
    assert (
        "Best adapter: t001, exact_match 0.8000 ± 0.0125 (default 0.5000 ± 0.0125, base model 0.2500 ± 0.0125)" in text
    )
    assert "t001 0.7750 ± 0.0250, default 0.4750 ± 0.0250, base model 0.2250" in text
    assert "PeftModel.from_pretrained(base, 'runs/dates/trials/t001/adapter')" in text
    assert "--lora-modules t001=runs/dates/trials/t001/adapter --max-lora-rank 16\n" in text
    assert "10k tokens trained in 5s: 2k tokens/s over all adapters, 8s in all" in text


def test_base_and_default_are_shown_however_long_the_list():
    trials = [trial(i, 1 - i / 1000) for i in range(1, 200)]
    trials += [trial(0, 0.1, name="default"), TrialSummary(None, "base", objective=0.05)]
    text = printed(leaderboard(trials, "maximize"), max_rows=10)
    rows = [line.split() for line in text.splitlines() if "complete" in line or "no adapter" in line]
    assert [row[0] for row in rows][-3:] == ["10", "200", "201"]
    assert "189 more in runs/dates/results.csv" in text


def test_says_so_when_the_base_model_is_better(ranked):
    worse = leaderboard([replace(t, objective=0.9) if t.is_base else t for t in ranked], "maximize")
    assert "No adapter scores better than the base model without one." in notes(worse, INFO)
    assert "No adapter scores better than the base model without one." not in notes(ranked, INFO)


def test_without_a_complete_trial_there_is_no_winner():
    text = printed(leaderboard([trial(1, None, state="diverged")], "maximize"))
    assert "no best adapter" in text
    assert "PeftModel" not in text


def test_a_name_with_markup_is_shown_as_it_is():
    ranked = leaderboard([trial(1, 0.5, name="[red]x")], "maximize")
    assert printed(ranked, replace(INFO, name="[bold]y")).count("[red]x") >= 2
    assert "[bold]y" in printed(ranked, replace(INFO, name="[bold]y"))


def test_verdict_by_loss_where_there_is_no_objective():
    ranked = leaderboard([trial(1, None)], "maximize")
    assert verdict(ranked, INFO) == "Best adapter: t001, val_loss 1.5000."
