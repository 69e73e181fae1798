from __future__ import annotations

import errno
import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas
import pytest
import torch
from optuna.trial import TrialState

import plora
from plora.checkpoint.jsonl import JsonLines
from plora.checkpoint.layout import SweepLayout
from plora.checkpoint.state import load_state
from plora.config import load
from plora.data.tokenizer import load as load_tokenizer
from plora.data.types import Task
from plora.engine.tasks import load_tasks
from plora.planner import Plan
from plora.search.study import open_study
from tests.engine import oracle, tiny
from tests.engine.conftest import Finished, run

Settings = Callable[..., tiny.Tree]
STEPS = {"default": 4, "t001": 4, "t002": 4, "t003": 3}
DIVERGING = {"lr": 1e38, "max_grad_norm": None, "schedule": "constant", "warmup_steps": 0, "max_steps": 6}


@pytest.fixture(scope="module")
def tasks(by_loss: Finished, model: Path) -> dict[str, Task]:
    """The data of ``by_loss``, read once more from what it wrote."""
    config = load(by_loss.layout.config, new_sweep=False)
    return load_tasks(config, load_tokenizer(str(model), max_seq_len=128))


def by_number(study: optuna.Study) -> dict[str, optuna.trial.FrozenTrial]:
    return {trial.user_attrs["name"]: trial for trial in study.trials}


def test_every_trial_and_the_base_on_each_data_set_are_ranked_by_loss(by_loss: Finished) -> None:
    rows = by_loss.rows
    assert set(rows) == {*STEPS, "base-questions", "base-orders"}
    losses = [row["val_loss"] for row in rows.values()]
    assert losses == sorted(losses)
    assert [row["objective"] for row in rows.values()] == losses
    assert {name: rows[name]["steps"] for name in STEPS} == STEPS
    assert by_loss.result.best is not None
    assert by_loss.result.best.name == next(name for name in rows if name in STEPS)


def test_settings_really_differ(by_loss: Finished) -> None:
    columns = ("rank", "lr", "batch_size", "target_modules", "dropout", "rslora", "dataset")
    assert {name: tuple(by_loss.rows[name][c] for c in columns) for name in STEPS} == {
        "default": (4, 1e-2, 4, "q_proj v_proj", 0.0, False, "questions"),
        "t001": (8, 1e-2, 3, "all-linear", 0.0, False, "questions"),
        "t002": (2, 3e-2, 8, "down_proj o_proj", 0.2, False, "questions"),
        "t003": (4, 3e-3, 4, "q_proj v_proj", 0.0, True, "orders"),
    }


def test_results_csv_is_the_table_that_is_returned(by_loss: Finished) -> None:
    written = pandas.read_csv(by_loss.layout.results)
    returned = by_loss.result.results
    assert list(written.columns) == list(returned.columns)
    for name in ("trial", "objective", "val_loss", "test_score", "steps", "lr"):
        assert written[name].dropna().tolist() == pytest.approx(returned[name].dropna().tolist()), name


def test_study_holds_values_intermediate_values_and_settings(by_loss: Finished) -> None:
    study = open_study(by_loss.layout.root)
    assert (study.direction.name, study.metric_names) == ("MINIMIZE", ["val_loss"])
    stored = by_number(study)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    assert list(stored) == list(STEPS)
    for name, trial in stored.items():
        row = by_loss.rows[name]
        assert trial.value == pytest.approx(row["val_loss"])
        assert trial.user_attrs["scores"]["val_loss"] == pytest.approx(row["val_loss"])
        assert trial.user_attrs["standard_errors"]["val_loss"] == pytest.approx(row["val_loss_se"])
        evals = [line for line in tiny.read_lines(by_loss.layout.metrics(name)) if line["kind"] == "eval"]
        assert trial.intermediate_values == pytest.approx({line["step"]: line["val_loss"] for line in evals})
        assert list(trial.intermediate_values) == [2, STEPS[name]]
    assert stored["t002"].params["rank"] == 2


def test_metrics_and_events_tell_the_whole_story(by_loss: Finished) -> None:
    for name, total in STEPS.items():
        steps = [line for line in tiny.read_lines(by_loss.layout.metrics(name)) if line["kind"] == "step"]
        assert [line["step"] for line in steps] == list(range(1, total + 1))
        assert all(line["loss"] > 0 and line["grad_norm"] > 0 and not line["skipped"] for line in steps)
    events = tiny.read_lines(by_loss.layout.events)
    kinds = [event["event"] for event in events]
    assert (kinds[0], kinds[-1]) == ("sweep_started", "sweep_ended")
    for kind in ("trial_started", "trial_ended"):
        assert sorted(event["trial"] for event in events if event["event"] == kind) == sorted(STEPS)
    assert events[-1]["best"] == by_loss.result.best.name  # type: ignore[union-attr]


def test_config_is_written_so_that_the_sweep_can_be_run_again(by_loss: Finished, tmp_path: Path) -> None:
    again = load(by_loss.layout.config, {"output_dir": str(tmp_path / "again")})
    first = load(by_loss.layout.config, new_sweep=False)
    assert again.trials == first.trials
    assert [trial.name for trial in again.trials] == list(STEPS)
    assert (again.seed, again.evaluation.every, again.export.dtype) == (3, 0.5, "fp32")


def test_plan_names_every_trial_once_with_its_memory(by_loss: Finished) -> None:
    plan = Plan.load(by_loss.layout.plan)
    assert sorted(trial.name for job in plan.jobs for trial in job.trials) == sorted(STEPS)
    assert {trial.name: trial.steps for job in plan.jobs for trial in job.trials} == STEPS
    assert all(0 < job.allocated_bytes <= job.memory_bytes < plan.free_bytes for job in plan.jobs)


def test_report_shows_trials_bases_and_predicted_beside_measured_time(by_loss: Finished) -> None:
    page = by_loss.layout.report.read_text()
    for text in (
        *STEPS,
        "base model on questions",
        "base model on orders",
        "predicted",
        "measured",
        "job 0",
        "PeftModel",
    ):
        assert text in page, text


def test_exported_adapters_give_the_same_logits_in_peft(by_loss: Finished, tasks: dict[str, Task], model: Path) -> None:
    for trial in load(by_loss.layout.config, new_sweep=False).trials:
        example = tasks[trial.name].val[2]
        ours = oracle.packed_logits(model, by_loss.layout, trial, example)
        theirs = oracle.logits(oracle.peft_model(model, by_loss.layout.adapter(trial.name)), example)
        plain = oracle.logits(oracle.peft_model(model, None), example)
        assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
        assert (ours - plain).abs().max() > 1e-3 * ours.abs().max()
        assert by_loss.rows[trial.name]["adapter_dir"] == str(by_loss.layout.adapter(trial.name))


def test_losses_are_those_of_peft_on_the_same_data(by_loss: Finished, tasks: dict[str, Task], model: Path) -> None:
    for name in STEPS:
        tuned = oracle.peft_model(model, by_loss.layout.adapter(name))
        assert by_loss.rows[name]["val_loss"] == pytest.approx(oracle.loss(tuned, tasks[name].val), rel=1e-5)
    plain = oracle.peft_model(model, None)
    for dataset, name in (("questions", "default"), ("orders", "t003")):
        expected = oracle.loss(plain, tasks[name].val)
        assert by_loss.rows[f"base-{dataset}"]["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_test_data_are_scored_for_winner_base_and_default_alone(
    by_loss: Finished, tasks: dict[str, Task], model: Path
) -> None:
    scored = {name for name, row in by_loss.rows.items() if not math.isnan(row["test_score"])}
    best = by_loss.result.best
    assert best is not None
    assert best.name not in ("default", "t003"), "the fixture is to have another winner, on the first data set"
    assert scored == {best.name, "default", "base-questions"}
    for name, adapter in ((best.name, best.adapter_dir), ("base-questions", None)):
        expected = oracle.loss(oracle.peft_model(model, adapter), tasks[best.name].test)
        assert by_loss.rows[name]["test_score"] == pytest.approx(expected, rel=1e-5)


def test_packs_change_no_result_and_the_base_is_evaluated_once_per_data_set(
    by_loss: Finished, settings: Settings, data: Path
) -> None:
    halves = run(settings(**tiny.two_datasets(data), packing={"max_adapters": 2}))
    (job,) = Plan.load(halves.layout.plan).jobs
    assert max(len([t for t in job.trials if t.start_round <= r < t.end_round]) for r in range(job.rounds)) == 2
    assert list(halves.rows) == list(by_loss.rows)
    for name, row in by_loss.rows.items():
        assert halves.rows[name]["val_loss"] == pytest.approx(row["val_loss"], rel=1e-5), name
        assert halves.rows[name]["tied"] == row["tied"]
    bases = tiny.read_lines(halves.layout.metrics("base"))
    assert sorted(line["task"] for line in bases) == ["orders", "questions"]


def test_a_diverging_trial_is_marked_and_harms_nobody(by_loss: Finished, settings: Settings) -> None:
    mixed = run(settings(search={"trials": [tiny.MIXED[0], DIVERGING]}))
    assert {name: row["state"] for name, row in mixed.rows.items()} == {
        "t001": "complete", "default": "complete", "base": "complete", "t002": "diverged",
    }  # fmt: skip
    assert "not finite" in mixed.rows["t002"]["error"]
    assert list(mixed.rows)[-1] == "t002"
    for name in ("t001", "default"):
        assert mixed.rows[name]["val_loss"] == pytest.approx(by_loss.rows[name]["val_loss"], rel=1e-5)
    study = by_number(open_study(mixed.layout.root))
    assert study["t002"].state is TrialState.FAIL
    assert study["t002"].user_attrs["reason"].startswith("diverged after")
    assert [study[name].state for name in ("default", "t001")] == [TrialState.COMPLETE] * 2
    assert not mixed.layout.adapter("t002").exists()
    assert not mixed.layout.state("t002").exists()
    assert "t002 diverged" in mixed.layout.report.read_text()


@pytest.mark.parametrize("steps", [1, 6])  # one step is followed by no other that could be skipped
def test_all_trials_diverging_is_reported(settings: Settings, steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    trial = {**settings()["trial"], **DIVERGING, "max_steps": steps, "target_modules": "all-linear"}
    lost = run(settings(trial=trial, search={"trials": [{"rank": 2}]}))
    assert lost.result.best is None
    assert {name: row["state"] for name, row in lost.rows.items()} == {
        "base": "complete", "default": "diverged", "t001": "diverged",
    }  # fmt: skip
    assert "No trial completed" in capsys.readouterr().out
    assert "No trial completed" in lost.layout.report.read_text()
    assert "none completed" in repr(lost.result)
    assert {trial.state for trial in open_study(lost.layout.root).trials} == {TrialState.FAIL}
    assert math.isfinite(lost.rows["base"]["val_loss"])
    assert not list(lost.layout.root.rglob("adapter_model.safetensors"))


def test_interrupting_keeps_what_is_finished(settings: Settings, tmp_path: Path, command: Callable[..., int]) -> None:
    tracker = {"_component_": "tests.engine.tiny.Interrupter", "step": 4}
    assert command(settings(metric_logger=tracker)) == 130
    layout = SweepLayout(tmp_path / "run")
    study = by_number(open_study(layout.root))
    assert {name: trial.state.name for name, trial in study.items()} == {
        "default": "RUNNING", "t001": "RUNNING", "t002": "RUNNING", "t003": "COMPLETE",
    }  # fmt: skip
    assert study["t003"].value == study["t003"].intermediate_values[3]
    assert list(study["default"].intermediate_values) == [2]
    weights, about = load_state(layout.state("t003"))
    assert about["rank"] == 4
    assert all(torch.isfinite(x).all() and x.abs().max() > 0 for x in weights.values())
    ended = [event["trial"] for event in tiny.read_lines(layout.events) if event["event"] == "trial_ended"]
    assert ended == ["t003"]
    assert tiny.read_lines(layout.events)[-1]["completed"] == ["t003"]
    said = layout.log.read_text().splitlines()[-1]
    assert "interrupted: 1 of 4 trials had completed" in said
    assert str(layout.checkpoints) in said
    assert not layout.results.exists()
    assert not logging.getLogger("plora").handlers


@pytest.mark.parametrize(
    ("last_written", "completed", "fails"),
    [("checkpoints/t003.safetensors", 1, "append"), ("results.csv", 4, "append"), ("results.csv", 4, "close")],
)
def test_a_disk_that_fills_up_keeps_what_is_finished(
    settings: Settings,
    tmp_path: Path,
    command: Callable[..., int],
    last_written: str,
    completed: int,
    fails: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = SweepLayout(tmp_path / "run")
    write = getattr(JsonLines, fails)

    def attempt(*arguments: Any) -> None:
        if (layout.root / last_written).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(JsonLines, fails, attempt)
    assert command(settings()) == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("plora: "))
    assert said.startswith(f"plora: output_dir = '{layout.root}': No space left on device (")
    assert f"{completed} of 4 trials had completed; their weights are in {layout.checkpoints}" in said
    assert load_state(layout.state("t003"))
    assert not logging.getLogger("plora").handlers


def test_the_log_tells_when_trials_start_and_end(by_loss: Finished) -> None:
    log = by_loss.layout.log.read_text()
    for name, steps in STEPS.items():
        assert f"INFO plora.report.live: {name} started: {steps} steps, " in log
        assert re.search(
            rf"{name} complete after {steps} steps: .* val loss {by_loss.rows[name]['val_loss']:.4f}\n", log
        )


@pytest.mark.parametrize("method", ["start_run", "log", "end_run"])
def test_a_tracker_that_raises_stops_nothing(settings: Settings, method: str) -> None:
    trackers = [{"_component_": "tests.engine.tiny.Broken", "method": method}]
    trackers.append({"_component_": "tests.engine.tiny.Notebook"})
    tiny.Notebook.told.clear()
    done = run(settings(search={"trials": [{"rank": 2, "max_steps": 2}]}, metric_logger=trackers))
    assert {row["state"] for row in done.rows.values()} == {"complete"}
    log = done.layout.log.read_text()
    assert log.count("Broken failed and is switched off") == 1
    told = tiny.Notebook.told
    assert ("start", "t001", 2, 2) in told
    assert ("end", "default", "complete") in told
    logged = [step for kind, _, step, *_ in told if kind == "step"]
    assert sorted(logged) == [1, 1, 2, 2, 3, 4]


def test_python_interface_takes_overrides_and_shows_its_result(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps(settings(search={"trials": [{"rank": 2}]})))
    result = plora.sweep(file, output_dir=str(tmp_path / "other"), trial__lr=5e-3, export__keep=0, trial__max_steps=1)
    assert not (tmp_path / "run").exists()
    assert set(result.results[result.results.trial != "base"]["lr"]) == {5e-3}
    assert result.best is not None
    assert result.best.name in ("default", "t001")
    assert result.best.adapter_dir is None
    assert len(result.study.trials) == 2
    page = result._repr_html_()
    for text in ("2 trials", f"best {result.best.name}", "objective", str(tmp_path / "other" / "report.html")):
        assert text in page, text


def test_the_command_runs_a_sweep(settings: Settings, command: Callable[..., int], tmp_path: Path) -> None:
    arguments = ["search.trials=[{rank: 2}]", "trial.max_steps=1", "export.keep=1"]
    assert command(settings(dataset_test=None), *arguments) == 0
    table = pandas.read_csv(tmp_path / "run" / "results.csv")
    assert sorted(table.trial) == ["base", "default", "t001"]
    assert table.test_score.isna().all()
    assert table.adapter_dir.notna().sum() == 1
