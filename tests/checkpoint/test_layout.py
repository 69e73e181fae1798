"""Where a sweep's files lie."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime, timezone

import optuna
import pytest

from plora.checkpoint.jsonl import read_jsonl
from plora.checkpoint.layout import EventLog, SweepLayout


def test_paths_lie_where_the_design_says(tmp_path):
    layout = SweepLayout(tmp_path)
    relative = {
        name: str(getattr(layout, name).relative_to(tmp_path))
        for name in ("config", "plan", "study", "events", "log", "results", "report", "trials", "checkpoints")
    }
    assert relative == {
        "config": "config.yaml",
        "plan": "plan.json",
        "study": "study.db",
        "events": "events.jsonl",
        "log": "log.txt",
        "results": "results.csv",
        "report": "report.html",
        "trials": "trials",
        "checkpoints": "checkpoints",
    }
    assert layout.adapter("t001").parent == layout.metrics("t001").parent == layout.trial("t001")
    assert layout.predictions("t001", "test") != layout.predictions("t001", "val")
    assert layout.state("t001") != layout.state("t002")


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc", "."])
def test_a_name_cannot_leave_the_directory(tmp_path, name):
    with pytest.raises(ValueError, match="directory name"):
        SweepLayout(tmp_path).trial(name)


def test_study_url_opens_in_optuna(tmp_path):
    layout = SweepLayout(tmp_path)
    layout.create()
    optuna.create_study(storage=layout.study_url, study_name="s")
    assert layout.study.exists()


def test_holds_sweep(tmp_path):
    layout = SweepLayout(tmp_path / "run")
    assert not layout.holds_sweep()
    layout.root.mkdir()
    (layout.root / "notes.md").write_text("mine")
    assert not layout.holds_sweep()
    with EventLog(layout.events) as log:
        log.event("start")
    assert layout.holds_sweep()


def test_of_two_sweeps_that_start_at_once_one_goes_on(tmp_path):
    SweepLayout(tmp_path / "run").create()
    with pytest.raises(ValueError, match="another sweep has started there"):
        SweepLayout(tmp_path / "run").create()


def test_event_log_times_are_utc(tmp_path):
    with EventLog(tmp_path / "events.jsonl") as log:
        log.event("trial_finished", trial="t001", val_loss=float("nan"))
    (record,) = read_jsonl(tmp_path / "events.jsonl")
    assert (record["event"], record["trial"], record["val_loss"]) == ("trial_finished", "t001", None)
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(record["time"])).total_seconds()) < 60


def test_layout_needs_no_torch():
    code = "import sys, plora.checkpoint.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
