"""Events reach everybody."""

from __future__ import annotations

import inspect

import pytest

from plora.report.listener import Listener, Listeners
from plora.report.live import LiveView
from plora.report.metrics_file import MetricsFile
from plora.report.trackers import Tracker


class Recorder(Listener):
    def __init__(self, name, heard):
        for method in ("on_start", "on_step", "on_round", "on_eval", "on_finish", "close"):
            setattr(self, method, lambda *args, method=method: heard.append((name, method, args)))


def test_every_listener_hears_every_event_in_order():
    heard = []
    both = Listeners([Recorder("a", heard), Recorder("b", heard)])
    both.on_start("t", 4)
    both.on_step("t", "record")
    both.on_round("round")
    both.on_eval(None, "eval")
    both.on_finish("t", "result", "adapter")
    both.close()
    expected = [
        ("on_start", ("t", 4)),
        ("on_step", ("t", "record")),
        ("on_round", ("round",)),
        ("on_eval", (None, "eval")),
        ("on_finish", ("t", "result", "adapter")),
        ("close", ()),
    ]
    assert heard == [(name, *event) for event in expected for name in "ab"]


def test_all_are_closed_though_one_raises():
    heard = []

    class Failing(Listener):
        def close(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Listeners([Failing(), Recorder("b", heard)]).close()
    assert [method for _, method, _ in heard] == ["close"]


@pytest.mark.parametrize("kind", [Listener, Listeners, LiveView, MetricsFile, Tracker])
def test_events_are_those_of_the_training(kind):
    records = pytest.importorskip("plora.training.records")
    for name in ("on_start", "on_step", "on_round", "on_eval", "on_finish"):
        told = list(inspect.signature(getattr(records.Listener, name)).parameters)
        assert list(inspect.signature(getattr(kind, name)).parameters) == told, name
