"""The live view on terminals and elsewhere."""

from __future__ import annotations

import io
import logging
import math
import re
import sys

import pytest
from rich.console import Console

from plora.report.live import LiveView


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def plain(console_file):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console_file.getvalue())


def screen(view, width, height):
    console = Console(file=io.StringIO(), width=width, height=height)
    view._console = console
    console.print(view.render())
    return console.file.getvalue().rstrip("\n").split("\n")


def test_without_a_terminal_a_line_a_minute_and_at_both_ends(
    make_trial, make_record, make_round, make_eval, make_result, caplog
):
    caplog.set_level(logging.INFO, "plora")
    clock, out = Clock(), io.StringIO()
    trial = make_trial(0)
    trials = [trial, make_trial(1, rank=32, lr=1e-3)]
    with LiveView(trials, Console(file=out, width=60), clock=clock) as view:
        view.on_start(trial, 300)
        for step in range(1, 301):
            clock.now += 1.0
            view.on_step(trial, make_record(step, total=300, loss=2.0))
            view.on_round(make_round(100, 0.5))
            if step == 100:
                view.on_eval(trial, make_eval(step, val_loss=(1.25, 0.1)))
        view.on_finish(trial, make_result(trial), None)
    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + 5 + 1
    assert lines[0].endswith("default started: 300 steps, rank 8 · lr 2e-4")
    assert "step 60/600 (10%) · 1 running, 1 waiting · 200 tokens/s" in lines[1]
    assert "val loss" not in lines[1]
    assert "best val loss 1.2500 (default) · 2m00s elapsed, ETA 8m00s" in lines[2]
    assert lines[-1].endswith("default complete after 300 steps: train loss 2.0000, val loss 1.2500")
    assert "\x1b" not in out.getvalue()
    assert caplog.messages == [line.partition("  ")[2] for line in (lines[0], lines[-1])]
    assert view.throughput == 200


def test_table_shows_what_differs(make_trial, make_record, make_eval, make_result):
    trials = [make_trial(0), make_trial(1, rank=32), make_trial(2, lr=1e-3)]
    clock = Clock()
    view = LiveView(trials, Console(file=io.StringIO()), clock=clock)
    for trial in trials[:2]:
        view.on_start(trial, 10)
    for step in (1, 2):
        clock.now += 2.0
        view.on_step(trials[1], make_record(step, total=10, loss=1.5, tokens=3000))
    view.on_eval(None, make_eval(0, val_loss=2.5))
    view.on_eval(trials[1], make_eval(2, val_loss=1.125))
    view.on_finish(trials[0], make_result(trials[0], "diverged"), None)
    lines = screen(view, 120, 30)
    header = next(line for line in lines if "train loss" in line)
    assert header.split() == ["trial", "rank", "lr", "step", "train", "loss", "val", "loss", "tokens/s", "ETA"]
    rows = {line.split()[0]: line.split() for line in lines if line.split()}
    assert rows["t001"] == ["t001", "32", "2e-4", "2/10", "1.5000", "1.1250", "1.5k", "16s"]
    assert rows["default"][-1] == "diverged"
    assert rows["t002"][-1] == "waiting"
    assert "best val loss 1.1250 (t001; base 2.5000)" in " ".join(lines[-2:])


@pytest.mark.parametrize("size", [(200, 50), (80, 24), (60, 10), (30, 5)])
def test_two_hundred_trials_fit_any_terminal(make_trial, make_record, size):
    trials = [
        make_trial(i, rank=2 ** (i % 6), lr=1e-5 * (i + 1), schedule=f"s{i}", target=("q_proj",) * (i % 9))
        for i in range(200)
    ]
    view = LiveView(trials, Console(file=io.StringIO()), clock=Clock())
    for trial in trials[:150]:
        view.on_start(trial, 10)
        view.on_step(trial, make_record(1, total=10, loss=math.nan if trial.number == 3 else trial.number + 0.5))
    lines = screen(view, *size)
    if size[1] > 20:
        assert len(lines) <= size[1]
        assert "150 running, 50 waiting" in " ".join(lines)
        assert f"{200 - (size[1] - 5)} more trials not shown" in " ".join(" ".join(lines).split())
        names = [line.split()[0] for line in lines if re.match(r"(default|t\d+) ", line)]
        assert len(names) == size[1] - 5
        assert "t003" not in names
        assert names[0] == "default"


def test_markup_in_a_name_is_shown_as_it_is(make_trial):
    trial = make_trial(0, schedule="[red]x[/red]")
    view = LiveView([trial, make_trial(1)], Console(file=io.StringIO()), clock=Clock())
    assert any("[red]x[/red]" in line for line in screen(view, 150, 20))


def test_logging_appears_above_the_table_and_keeps_its_handler(monkeypatch, make_trial):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("some.library")
    logger.addHandler(handler)
    written = []
    monkeypatch.setattr(terminal, "write", lambda text: written.append(text) or len(text))
    try:
        with LiveView(
            [make_trial(0)],
            Console(file=terminal, force_terminal=True, _environ={"TERM": "xterm"}, width=100, height=20),
        ):
            assert handler.stream is not terminal
            written.clear()
            logger.warning("disk is nearly full")
            printed = "".join(written)
        assert handler.stream is terminal
        assert sys.stderr is terminal
    finally:
        logger.removeHandler(handler)
    # The cursor goes up over the table, the message is written, and the table is drawn below it.
    message = printed.index("disk is nearly full")
    assert "\x1b[1A" in printed[:message]
    assert "train loss" in printed[message:]


def test_a_log_file_is_left_alone(monkeypatch, make_trial, tmp_path):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    handlers = [logging.FileHandler(tmp_path / "log.txt"), logging.StreamHandler(sys.stderr)]
    streams = [handler.stream for handler in handlers]
    logger = logging.getLogger("another.library")
    for handler in handlers:
        logger.addHandler(handler)
    try:
        with LiveView([make_trial(0)], Console(file=terminal, force_terminal=True, _environ={"TERM": "xterm"})):
            logger.warning("kept")
            assert [handler.stream for handler in handlers] == streams
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close() if handler is handlers[0] else None
    assert (tmp_path / "log.txt").read_text() == "kept\n"
    assert streams[1].getvalue() == "kept\n"


def test_the_last_table_stays_on_the_terminal(make_trial, make_record, make_result):
    terminal = Terminal()
    trial = make_trial(0)
    with LiveView(
        [trial], Console(file=terminal, force_terminal=True, _environ={"TERM": "xterm"}, width=100, height=20)
    ) as view:
        view.on_start(trial, 4)
        view.on_step(trial, make_record(4, loss=0.125))
        view.on_finish(trial, make_result(trial), None)
    last = plain(terminal).rpartition("train loss")[2]
    assert "4/4" in last
    assert "0.1250" in last
    assert "complete" in last
    assert "started" not in plain(terminal)  # lines are for where there is no table


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(make_trial):
    terminal = Terminal()
    with LiveView([make_trial(0)], Console(file=terminal, force_terminal=True, _environ={"TERM": "dumb"})) as view:
        view.on_start(make_trial(0), 4)
    assert "default started: 4 steps" in plain(terminal)
