"""One plan: what is written is what is trained, it can be fed back, and what was measured stands beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from plora.checkpoint.layout import SweepLayout
from plora.planner import Plan, PlannedJob
from tests.engine import tiny
from tests.engine.conftest import Finished, run

Settings = Callable[..., tiny.Tree]
Command = Callable[..., int]


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's sweeps keep their profiles."""
    monkeypatch.setattr("plora.engine.costs.profile_folder", lambda: tmp_path / "profiles")
    return tmp_path / "profiles"


def order_of(layout: SweepLayout) -> list[tuple[str, str]]:
    """Starts and ends of trials as they happened."""
    events = tiny.read_lines(layout.events)
    return [(e["event"].removeprefix("trial_"), e["trial"]) for e in events if e["event"].startswith("trial_")]


def planned_order(plan: Plan) -> list[tuple[str, str]]:
    """Starts and ends of trials as a plan has them."""
    found = []
    for job in plan.jobs:
        marks = sorted({t.start_round for t in job.trials} | {t.end_round for t in job.trials})
        for mark in marks:
            found += [("ended", t.name) for t in job.trials if t.end_round == mark]
            found += [("started", t.name) for t in job.trials if t.start_round == mark]
    return found


def predictions(layout: SweepLayout) -> dict[tuple[str, str], dict[str, str]]:
    with open(layout.predictions_table, newline="") as file:
        return {(row["of"], row["figure"]): row for row in csv.DictReader(file)}


def test_trials_join_and_leave_as_the_plan_says(by_loss: Finished, settings: Settings) -> None:
    two = run(settings(packing={"max_adapters": 2}))
    plan = Plan.load(two.layout.plan)
    assert max(trial.start_round for job in plan.jobs for trial in job.trials) > 0
    assert sorted(order_of(two.layout)) == sorted(planned_order(plan))
    positions = {event: place for place, event in enumerate(order_of(two.layout))}
    for job in plan.jobs:
        for trial in job.trials:
            for other in job.trials:
                if other.end_round <= trial.start_round:
                    assert positions["ended", other.name] < positions["started", trial.name]
    together = Plan.load(by_loss.layout.plan)
    assert {trial.start_round for job in together.jobs for trial in job.trials} == {0}


def cut_in_two(plan: Plan) -> Plan:
    """The same trials in two jobs, the second's one after the other."""
    (job,) = plan.jobs
    half = len(job.trials) // 2
    late = [replace(trial, start_round=0) for trial in job.trials[half:]]
    late = [late[0], *(replace(t, start_round=late[0].steps) for t in late[1:])]
    second = replace(job, number=1, trials=tuple(late), start=job.end)
    return replace(plan, jobs=(replace(job, trials=job.trials[:half]), second))


def test_a_plan_fed_back_is_followed(settings: Settings, command: Command, tmp_path: Path) -> None:
    assert command(settings(), "plan_only=true") == 0
    layout = SweepLayout(tmp_path / "run")
    mine = cut_in_two(Plan.load(layout.plan))
    mine.save(tmp_path / "mine.json")
    done = run(settings(plan=str(tmp_path / "mine.json")))
    followed = Plan.load(done.layout.plan)
    assert followed.method == "given"

    def shape(jobs: tuple[PlannedJob, ...]) -> list[list[tuple[str, int]]]:
        return [[(trial.name, trial.start_round) for trial in job.trials] for job in jobs]

    assert shape(followed.jobs) == shape(mine.jobs)
    order = order_of(done.layout)
    first, (second, last) = [t.name for t in mine.jobs[0].trials], [t.name for t in mine.jobs[1].trials]
    assert {name for _, name in order[: 2 * len(first)]} == set(first)
    assert order[2 * len(first) :] == [("started", second), ("ended", second), ("started", last), ("ended", last)]
    assert {of for of, _ in predictions(done.layout)} == {"job 0", "job 1", "sweep"}


def test_results_do_not_depend_on_the_plan(by_loss: Finished, settings: Settings, data: Path, tmp_path: Path) -> None:
    mine = cut_in_two(Plan.load(by_loss.layout.plan))
    mine.save(tmp_path / "mine.json")
    done = run(settings(**tiny.two_datasets(data), plan=str(tmp_path / "mine.json")))
    for name, row in by_loss.rows.items():
        assert done.rows[name]["val_loss"] == pytest.approx(row["val_loss"], rel=1e-5), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "Other"}, "it is for the model Other, not Tiny-Llama-Instruct"),
        ({"dtype": "nf4"}, "it is for a base in nf4, model.dtype is fp32"),
        ({"n_devices": 8, "device": "h100"}, "it is for 8 devices (h100), there are 1"),
        ({"recomputed_layers": 99}, "Tiny-Llama-Instruct has 2 layers"),
        ({"graph_tokens": 64}, "up to 64 tokens as CUDA graphs, here those of up to 0 can"),
    ],
)
def test_a_plan_of_another_sweep_is_refused_before_anything_is_loaded(
    by_loss: Finished,
    settings: Settings,
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    message: str,
) -> None:
    replace(Plan.load(by_loss.layout.plan), **change).save(tmp_path / "mine.json")  # type: ignore[arg-type]
    broken = {"source": settings()["model"]["source"], "dtype": "fp32", "_component_": "tests.engine.tiny.no_weights"}
    assert command(settings(model=broken, plan=str(tmp_path / "mine.json"))) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "the hub is down" not in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_every_mismatch_of_a_plan_is_said_at_once(
    by_loss: Finished, settings: Settings, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_loss_plan = Plan.load(by_loss.layout.plan)
    by_loss_plan.save(tmp_path / "mine.json")
    more = {"trials": [*tiny.MIXED[:2], {"rank": 16}, {"rank": 1}]}
    assert command(settings(search=more, plan=str(tmp_path / "mine.json"))) == 2
    said = capsys.readouterr().err
    assert "does not match this sweep in 2 ways" in said
    assert "trial t003 has rank 16 and 4 steps, the plan says rank 4 and 3 steps" in said
    assert "trials in no job: t004" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no plan file"),
        ("{", "not a plan"),
        ('{"version": 1, "packs": []}', "a plan of another version; this is version 2: plan again"),
        ('{"version": 2, "jobs": []}', "it has no jobs"),
    ],
)
def test_a_file_that_is_no_plan_is_a_mistake_in_the_configuration(
    settings: Settings,
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    message: str,
) -> None:
    if text is not None:
        (tmp_path / "mine.json").write_text(text)
    assert command(settings(plan=str(tmp_path / "mine.json")), "packing.solver=gurobi") == 2
    said = capsys.readouterr().err
    assert "2 mistakes" in said
    assert message in said


def test_a_plan_and_hardware_exclude_each_other(
    by_loss: Finished, settings: Settings, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware = ["plan_only=true", "hardware.gpu=h100"]
    assert command(settings(plan=str(by_loss.layout.plan)), *hardware) == 2
    assert "remove hardware, or plan" in capsys.readouterr().err


def test_calibration_is_stored_and_used_by_the_next_sweep(settings: Settings, profiles: Path, tmp_path: Path) -> None:
    short = {"trials": [{"rank": 2, "max_steps": 2}]}
    first = run(settings(search=short, packing={"calibrate": "always"}))
    log = first.layout.log.read_text()
    assert "calibrating on cpu" in log
    assert "times measured" in log
    (file,) = profiles.iterdir()
    stored = json.loads(file.read_text())
    assert len(stored["rounds"]) >= 5
    assert not stored["costs"]["1"]["estimated"]
    assert not Plan.load(first.layout.plan).estimated
    again = run(settings(search=short, packing={"calibrate": "always"}, output_dir=str(tmp_path / "again")))
    assert "calibrating" not in again.layout.log.read_text()
    assert not Plan.load(again.layout.plan).estimated
    for name, row in first.rows.items():
        assert again.rows[name]["val_loss"] == pytest.approx(row["val_loss"], rel=1e-5)


def test_a_short_sweep_is_not_calibrated_but_learned_from(settings: Settings, profiles: Path, tmp_path: Path) -> None:
    short = {"trials": [{"rank": 2, "max_steps": 2}]}
    first = run(settings(search=short))
    log = first.layout.log.read_text()
    assert "not calibrated: that takes about" in log
    assert "times data sheet" in log
    assert Plan.load(first.layout.plan).estimated
    (file,) = profiles.iterdir()
    seen = len(json.loads(file.read_text())["rounds"])
    assert seen >= 1
    second = run(settings(search=short, output_dir=str(tmp_path / "again")))
    assert not Plan.load(second.layout.plan).estimated
    assert len(json.loads(file.read_text())["rounds"]) > seen


def test_never_calibrating_neither_measures_nor_learns(settings: Settings, profiles: Path) -> None:
    done = run(settings(search={"trials": [{"rank": 2, "max_steps": 2}]}, packing={"calibrate": "never"}))
    log = done.layout.log.read_text()
    assert "calibrated" not in log
    assert "calibrating on" not in log
    assert not profiles.exists()


def test_measured_stands_beside_predicted_in_the_file_the_page_and_the_terminal(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(settings(search={"trials": [{"rank": 2, "max_steps": 2}]}))
    shown, page = capsys.readouterr().out, done.layout.report.read_text()
    table = predictions(done.layout)
    (job,) = Plan.load(done.layout.plan).jobs
    assert float(table["job 0", "whole job"]["predicted"]) == pytest.approx(job.seconds)
    assert float(table["job 0", "step"]["predicted"]) == pytest.approx(job.round_seconds)
    parts = [float(table["sweep", part]["measured"]) for part in ("loading the base", "scoring the base", "jobs")]
    scores = float(table["sweep", "scores at the end"]["measured"])
    assert float(table["sweep", "everything"]["measured"]) == pytest.approx(sum(parts) + scores, rel=1e-6)
    assert 0 < float(table["job 0", "whole job"]["measured"]) <= parts[2]
    for text in ("Predicted and measured", "whole job", "scores at the end"):
        assert text in shown
        assert text in page
