"""How numbers are written."""

from __future__ import annotations

import math

import pytest

from plora.report import text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2e-4, "2e-4"),
        (0.00012345, "1.234e-4"),
        (0.05, "0.05"),
        (0.0, "0"),
        (32.0, "32"),
        (123456.0, "1.235e+05"),
        (-3e-5, "-3e-5"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_short_float(value, shown):
    assert text.short_float(value) == shown
    if math.isfinite(value):
        assert float(shown) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (("q_proj", "v_proj"), "q,v"),
        ((0.9, 0.999), "0.9,0.999"),
        ("all-linear", "all-linear"),
        (None, "–"),
        (True, "True"),
        ({"max_examples": 500}, "max_examples=500"),
        ({}, "–"),
    ],
)
def test_setting_value(value, shown):
    assert text.setting_value(value) == shown


def test_score():
    assert text.score(0.71234, 0.0121) == "0.7123 ± 0.0121"
    assert text.score(0.71234, math.nan) == "0.7123"
    assert text.score(None, 0.1) == "–"
    assert text.score(math.nan) == "nan"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0.5, "0.5"), (950.4, "950"), (12345, "12.3k"), (4.56e6, "4.56M"), (math.nan, "–")],
)
def test_count(value, shown):
    assert text.count(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.2, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (273600, "3d04h"), (None, "–"), (math.inf, "–")],
)
def test_duration(seconds, shown):
    assert text.duration(seconds) == shown


def test_settings_line_skips_what_a_trial_lacks():
    assert text.settings_line({"lr": 1e-3, "batch_size": 8}, ["batch_size", "rank", "lr"]) == "batch 8 · lr 1e-3"
