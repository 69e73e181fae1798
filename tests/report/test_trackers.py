"""Trackers: what they log, and that they never stop training."""

from __future__ import annotations

import logging
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest

from plora.report import MLflowLogger, TensorBoardLogger, WandBLogger


@pytest.fixture
def sweep(make_trial, make_record, make_eval, make_result):
    """Two trials whose steps alternate, as in a pack; the second one diverges."""
    trials = [make_trial(0), make_trial(1, rank=16, lr=1e-3)]

    def run(tracker, directory):
        tracker.open("my-sweep", directory)
        tracker.on_eval(None, make_eval(0, val_loss=2.0))
        for trial in trials:
            tracker.on_start(trial, 4)
        for step in range(1, 5):
            for trial in trials:
                tracker.on_step(trial, make_record(step, loss=trial.number + 1 / step if step < 4 else math.nan))
                if step == 2:
                    tracker.on_eval(trial, make_eval(step, val_loss=(0.9, 0.1)))
        tracker.on_finish(trials[0], make_result(trials[0], val_loss=0.75), None)
        tracker.on_finish(trials[1], make_result(trials[1], "diverged"), None)
        tracker.close()

    return run


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.logged, self.summary, self.exit_code, self.axes = settings, [], {}, None, []

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, values, step=None):
        assert self.exit_code is None, "logged after the end"
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    module = ModuleType("wandb")
    module.runs = []
    module.init = lambda **settings: module.runs.append(FakeRun(**settings)) or module.runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_has_a_run_of_its_own_per_trial(sweep, wandb, tmp_path):
    sweep(WandBLogger(project="p", tags=["x"]), tmp_path)
    first, second = wandb.runs
    assert [run.settings["name"] for run in wandb.runs] == ["default", "t001"]
    for run in wandb.runs:
        wanted = {"project": "p", "group": "my-sweep", "reinit": "create_new", "tags": ["x"], "dir": str(tmp_path)}
        assert wanted.items() <= run.settings.items()
        assert ("*", "step") in run.axes
        assert [v["step"] for v in run.logged if "train/loss" in v] == [1, 2, 3, 4]
        assert [v for v in run.logged if "eval/val_loss" in v] == [{"step": 2, "eval/val_loss": 0.9}]
    assert second.settings["config"]["rank"] == 16
    assert second.settings["config"]["lr"] == 1e-3
    assert first.logged[0]["train/loss"] == 1.0
    assert second.logged[0]["train/loss"] == 2.0
    assert first.summary["state"] == "complete"
    assert first.summary["final/val_loss"] == 0.75
    assert (first.exit_code, second.exit_code) == (0, 0)


def test_log_every_keeps_evaluations_and_the_last_step(sweep, wandb, tmp_path):
    sweep(WandBLogger(log_every=3), tmp_path)
    assert [v["step"] for v in wandb.runs[0].logged if "train/loss" in v] == [3, 4]
    assert any("eval/val_loss" in v for v in wandb.runs[0].logged)


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failure_is_logged_once_and_ends_only_the_tracker(sweep, wandb, tmp_path, caplog, monkeypatch, failing):
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        raise ConnectionError("no route to host")

    if failing == "init":
        wandb.init = fail
    else:
        monkeypatch.setattr(FakeRun, failing, fail)
    with caplog.at_level(logging.WARNING):
        sweep(WandBLogger(), tmp_path)
    assert len(calls) == 1
    (warning,) = caplog.records
    assert "WandBLogger" in warning.getMessage()
    assert "no route to host" in warning.getMessage()


def test_runs_left_open_are_ended_as_interrupted(make_trial, wandb, tmp_path):
    tracker = WandBLogger()
    tracker.open("s", tmp_path)
    tracker.on_start(make_trial(0), 4)
    tracker.close()
    assert wandb.runs[0].summary["state"] == "interrupted"
    assert wandb.runs[0].exit_code == 1


class FakeClient:
    def __init__(self, tracking_uri):
        self.uri, self.runs, self.experiments = tracking_uri, {}, {}
        FakeClient.last = self

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name):
        self.experiments[name] = f"e{len(self.experiments)}"
        return self.experiments[name]

    def create_run(self, experiment_id, run_name=None, tags=None):
        assert experiment_id in self.experiments.values()
        run_id = f"r{len(self.runs)}"
        self.runs[run_id] = {"name": run_name, "tags": dict(tags or {}), "params": {}, "metrics": [], "status": None}
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def log_param(self, run_id, key, value):
        self.runs[run_id]["params"][key] = value

    def log_metric(self, run_id, key, value, step=None):
        assert math.isfinite(value)
        self.runs[run_id]["metrics"].append((key, value, step))

    def set_tag(self, run_id, key, value):
        self.runs[run_id]["tags"][key] = value

    def set_terminated(self, run_id, status=None):
        self.runs[run_id]["status"] = status or "FINISHED"


def test_mlflow_nests_a_run_per_trial_under_the_sweep(sweep, monkeypatch, tmp_path):
    module = ModuleType("mlflow")
    module.MlflowClient = FakeClient
    monkeypatch.setitem(sys.modules, "mlflow", module)
    sweep(MLflowLogger(experiment="e", tracking_uri="file:x"), tmp_path)
    client = FakeClient.last
    assert client.uri == "file:x"
    (parent_id, parent), (_, first), (_, second) = client.runs.items()
    assert (parent["name"], first["name"], second["name"]) == ("my-sweep", "default", "t001")
    assert first["tags"]["mlflow.parentRunId"] == second["tags"]["mlflow.parentRunId"] == parent_id
    assert second["params"]["rank"] == 16
    assert second["params"]["target"] == "('q_proj', 'v_proj')"
    assert ("train/loss", 1.5, 2) in second["metrics"]
    assert ("eval/val_loss", 0.9, 2) in second["metrics"]
    assert [step for key, _, step in second["metrics"] if key == "train/loss"] == [1, 2, 3]  # the NaN is left out
    assert first["tags"]["plora.state"] == "complete"
    assert second["tags"]["plora.state"] == "diverged"
    assert [run["status"] for run in client.runs.values()] == ["FINISHED"] * 3


def test_tensorboard_writes_a_directory_per_trial(sweep, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sweep(TensorBoardLogger(), tmp_path)
    root = tmp_path / "tensorboard"
    assert sorted(p.name for p in root.iterdir()) == ["default", "t001"]
    events = EventAccumulator(str(root / "t001")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses[:3] == [(1, 2.0), (2, 1.5), (3, pytest.approx(1 + 1 / 3))]
    assert math.isnan(losses[3][1])
    assert [(event.step, event.value) for event in events.Scalars("eval/val_loss")] == [(2, pytest.approx(0.9))]
    assert EventAccumulator(str(root / "default")).Reload().Scalars("final/val_loss")[0].value == 0.75
    hparams = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"rank" in hparams
    assert b"diverged" in hparams


@pytest.mark.parametrize("kind", [WandBLogger, MLflowLogger])
def test_a_missing_package_is_said_at_once(kind, monkeypatch):
    monkeypatch.delitem(sys.modules, kind.package, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"{kind.__name__} needs the package '{kind.package}'.*pip install"):
        kind()


def test_log_every_is_checked():
    with pytest.raises(ValueError, match="log_every"):
        TensorBoardLogger(log_every=0)
