"""Results show themselves."""

from __future__ import annotations

from pathlib import Path

import optuna

from plora.report.results import TrialSummary, base_summary, leaderboard, to_dataframe, winner
from plora.report.sweep_result import SweepResult


def make(n=3, state="complete"):
    trials = [
        TrialSummary(
            i, f"<t{i}>", state, settings={"rank": 2**i, "lr": 1e-3}, objective=i / 10, objective_se=0.01, val_loss=1.5
        )
        for i in range(n)
    ]
    ranked = leaderboard([*trials, base_summary({}, "val_loss")], "maximize")
    return SweepResult(to_dataframe(ranked), winner(ranked), optuna.create_study(), Path("runs/x"))


def test_repr_says_what_won_and_what_differed():
    first, header, *rows = repr(make()).splitlines()
    assert first == "SweepResult(3 trials in runs/x, best <t2> with objective 0.2000 ± 0.0100)"
    assert header.split() == ["trial", "objective", "steps", "rank"] or "rank" in header.split()
    assert "lr" not in header.split()
    assert "adapter_dir" not in header.split()
    assert rows[0].split()[:2] == ["<t2>", "0.2"]
    assert "4" in rows[0].split()


def test_notebook_view_is_escaped_and_short():
    html = make(40)._repr_html_()
    assert "&lt;t39&gt;" in html
    assert "<t39>" not in html
    assert html.count("<tr") == 16
    assert "26 more" in html
    assert "report.html" in html


def test_a_sweep_without_a_winner_shows_itself():
    result = make(2, "diverged")
    assert result.best is None
    assert "2 trials in runs/x, none completed" in repr(result)
    assert "none completed" in result._repr_html_()
