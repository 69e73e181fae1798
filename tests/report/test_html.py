"""The page is whole, escaped and self-contained."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from plora.report.html import write_report
from plora.report.info import SweepInfo
from plora.report.metrics_file import Curve
from plora.report.results import TrialSummary, leaderboard

INFO = SweepInfo("dates", Path("runs/dates"), "org/base", "abc", "exact_match", "maximize", 10_000, 5.0, 8.0)
VOID = {"meta", "line", "circle", "polyline", "rect"}


class Page(HTMLParser):
    """Checks that elements nest and collects what is in them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.urls = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [value for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def summary(number, objective, **settings):
    settings = {"rank": 8, "lr": 1e-4 * (number + 1), "target_modules": "all-linear", **settings}
    name = "default" if number == 0 else f"t{number:03d}"
    state = "diverged" if objective is None else "complete"
    return TrialSummary(
        number, name, state, settings=settings, steps=50, tokens=5000, val_loss=1.5, val_loss_se=0.1,
        objective=objective, objective_se=0.0125, adapter_dir=Path("a") / name,
    )  # fmt: skip


def curve(start=2.0):
    train = [(step, start + 1 / step) for step in range(1, 51)]
    return Curve(train, [(10, start + 0.5), (50, start)])


@pytest.fixture
def ranked():
    trials = [summary(0, 0.5), summary(1, 0.8, rank=16), summary(2, 0.79), summary(3, None)]
    trials.append(TrialSummary(None, "base", objective=0.2, objective_se=0.01, val_loss=3.0))
    return leaderboard(trials, "maximize", tied=["t001", "t002"])


CURVES = {
    "default": curve(),
    "t001": curve(1.5),
    "t003": Curve([(1, 2.0), (2, math.nan)], []),
    "base": Curve([], [(0, 3.0)]),
}


def page(tmp_path, ranked, info=INFO, curves=None):
    write_report(tmp_path / "report.html", ranked, info, CURVES if curves is None else curves)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_all_is_there_and_nothing_is_loaded_from_elsewhere(tmp_path, ranked):
    text = page(tmp_path, ranked)
    parsed = Page(text)
    assert parsed.urls == []
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    words = " ".join(parsed.text)
    for wanted in (
        "0.8000 ± 0.0125",
        "base model",
        "tied",
        "diverged",
        "--max-lora-rank 16",
        "2k",
        "Best adapter: t001",
    ):
        assert wanted in words
    table = text[text.index("<tbody>") : text.index("</tbody>")]
    assert [re.sub("<.*", "", row) for row in re.findall(r"<b>(.*?)</b>", table)] == [
        "t001", "t002", "default", "base model", "t003",
    ]  # fmt: skip
    assert text.count("<figure><svg") == 2  # rank and lr
    assert text.count('<figure class="card') == 3
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text).lower()


def test_user_text_is_escaped(tmp_path):
    hostile = "<script>alert('&')</script>"
    trials = [summary(0, 0.5, target_modules=hostile), summary(1, 0.6, target_modules="b"), summary(2, None)]
    ranked = leaderboard(trials, "maximize")
    ranked[1:] = [replace(ranked[1], name=hostile), replace(ranked[2], error=hostile)]
    info = SweepInfo(hostile, Path(hostile), hostile, hostile, hostile, "maximize", details={hostile: hostile})
    parsed = Page(page(tmp_path, ranked, info, {}))
    assert "script" not in parsed.tags
    assert "".join(parsed.text).count("<script>") >= 8


@pytest.mark.parametrize("trials", [[], [summary(0, None)], [summary(0, 0.5)]])
def test_small_sweeps_have_a_page_too(tmp_path, trials):
    Page(page(tmp_path, leaderboard(trials, "minimize"), curves={}))


def test_scatter_falls_back_to_the_loss_where_few_have_the_objective(tmp_path):
    trials = [summary(i, 0.5 if i < 2 else math.nan, rank=2**i) for i in range(8)]
    text = page(tmp_path, leaderboard(trials, "maximize"), curves={})
    figure = text[text.index("<figure>") : text.index("</figure>")]
    assert ">val_loss</text>" in figure
    assert figure.count("<circle") == 8


def test_two_hundred_trials_stay_a_small_page(tmp_path):
    trials = [summary(i, i / 200, rank=2 ** (i % 7)) for i in range(200)]
    long = Curve([(step, 2.0 + math.sin(step)) for step in range(1, 3001)], [(s, 2.0) for s in range(300, 3001, 300)])
    text = page(tmp_path, leaderboard(trials, "maximize"), curves={t.name: long for t in trials})
    assert len(text) < 3_000_000
    assert text.count('<figure class="card') == 200
