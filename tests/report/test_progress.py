"""Pace, remaining time and what is worth showing."""

from __future__ import annotations

import math

import pytest

from plora.report.progress import progress_of


def make(make_trial, n):
    trials = [make_trial(i) for i in range(n)]
    return progress_of(trials, [{} for _ in trials], now=0.0)


def test_pace_and_eta_of_a_trial(make_trial, make_record):
    progress = make(make_trial, 1)
    trial = progress.trials["default"]
    assert trial.eta() is None
    assert trial.tokens_per_second() is None
    progress.start(trial, 10, now=100.0)
    for step in range(1, 5):
        progress.add_step(trial, make_record(step, total=10, tokens=50), now=100.0 + 2 * step)
    assert trial.tokens_per_second() == 200 / 8
    assert trial.eta() == 6 * 2


def test_a_resumed_trial_is_timed_from_where_it_resumed(make_trial, make_record):
    progress = make(make_trial, 1)
    trial = progress.trials["default"]
    progress.start(trial, 100, now=0.0)
    for step in (91, 92):
        progress.add_step(trial, make_record(step, total=100), now=float(step - 90))
    assert trial.eta() == 8
    assert progress.eta(now=2.0) == 8


def test_sweep_counts_waiting_trials_like_the_mean_and_ended_ones_as_over(make_trial, make_record):
    progress = make(make_trial, 4)
    default, first, second, _ = progress.trials.values()
    for trial, total in ((default, 10), (first, 20), (second, 30)):
        progress.start(trial, total, 0.0)
        progress.add_step(trial, make_record(5, total=total), now=10.0)
    second.state = "diverged"
    assert progress.steps() == (15, 15 + 5 + 15 + 20)
    assert progress.counts() == {"running": 2, "diverged": 1, "waiting": 1}


def test_speed_is_that_of_the_last_half_minute_of_training(make_trial, make_round):
    progress = make(make_trial, 1)
    assert progress.tokens_per_second() is None
    progress.add_round(make_round(10**6, 1.0))
    assert progress.tokens_per_second() == 10**6
    for _ in range(30):
        progress.add_round(make_round(50, 1.0))
    assert progress.tokens_per_second() == 50
    progress.add_round(make_round(100, 100.0))
    assert progress.tokens_per_second() == 1
    assert (progress.tokens, progress.train_seconds) == (10**6 + 30 * 50 + 100, 131)


def test_best_ignores_nan(make_trial):
    progress = make(make_trial, 3)
    assert progress.best() is None
    for trial, loss in zip(progress.trials.values(), (1.5, math.nan, 1.2), strict=True):
        progress.add_eval(trial, loss)
    progress.add_eval(progress.trials["t002"], 2.0)
    assert progress.best().name == "t002"
    assert progress.best().val_loss == 2.0


def test_most_relevant_prefers_running_then_finished_and_keeps_order(make_trial, make_record):
    progress = make(make_trial, 6)
    rows = list(progress.trials.values())
    for row, state, loss in zip(
        rows,
        ("waiting", "complete", "running", "diverged", "running", "complete"),
        (None, 0.5, 2.0, math.nan, 1.0, 0.4),
        strict=True,
    ):
        row.state = state
        progress.add_eval(row, loss)
    assert [row.number for row in progress.most_relevant(1)] == [4]
    assert [row.number for row in progress.most_relevant(3)] == [2, 4, 5]
    assert [row.number for row in progress.most_relevant(5)] == [1, 2, 3, 4, 5]
    assert len(progress.most_relevant(99)) == 6
    assert progress.most_relevant(-1) == []


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_an_unusable_validation_loss_is_no_best(make_trial, value):
    progress = make(make_trial, 1)
    progress.add_eval(progress.trials["default"], value)
    assert progress.best() is None
