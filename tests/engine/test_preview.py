"""``plan_only``: the plan is shown, for the devices here or others, and nothing is trained or written beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import plora
from plora.planner import plan_on
from tests.engine import tiny


def test_plan_for_this_machine_leaves_the_directory_free(
    settings: Callable[..., tiny.Tree], command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = settings()
    assert command(tree, "plan_only=true") == 0
    shown = capsys.readouterr().out
    assert "on 1 x cpu" in shown
    assert "4 trials in 1 job" in shown
    assert "Against the best one-at-a-time training" in shown
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"log.txt", "plan.html", "plan.json"}
    assert command(tree, "trial.max_steps=1") == 0  # the sweep itself can still run there


def test_plan_without_weights(
    settings: Callable[..., tiny.Tree], command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = settings()
    folder = tmp_path / "no weights"
    shutil.copytree(tree["model"]["source"], folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tree["model"]["source"] = str(folder)
    assert command(tree, "plan_only=true") == 0
    assert command(tree) != 0
    assert "has neither model.safetensors" in capsys.readouterr().err


def test_plan_for_devices_that_are_not_here(
    settings: Callable[..., tiny.Tree], command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    hardware = ["plan_only=true", "hardware.gpu=a100_40gb", "hardware.count=2"]
    assert command(settings(), *hardware) == 0
    shown = capsys.readouterr().out
    assert "on 2 x a100_40gb" in shown
    assert "GPU 1 " in shown


@pytest.mark.parametrize(("arguments", "seconds"), [([], 20.0), (["packing.time_limit=3"], 3.0)])
def test_the_search_takes_the_time_it_is_given(
    settings: Callable[..., tiny.Tree],
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    seconds: float,
) -> None:
    given = []

    def noted(*values: Any, time_limit: float, **options: Any) -> Any:
        given.append(time_limit)
        return plan_on(*values, time_limit=time_limit, **options)

    monkeypatch.setattr("plora.engine.planning.plan_on", noted)
    assert command(settings(), "plan_only=true", "hardware.gpu=h100", *arguments) == 0
    assert given == [seconds]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hardware.gpu=h100"], "set plan_only=true"),
        (
            ["plan_only=true", "hardware.gpu=h100", "packing.memory_fraction=0.001"],
            "a plan may use packing.memory_fraction",
        ),
        (["plan_only=true", "hardware.gpu=h900"], "no data sheet for the GPU 'h900'"),
        (["plan_only=true", "hardware.gpu=h100", "hardware.count=0"], "hardware.count = 0"),
        (
            ["plan_only=true", "hardware.gpu=h100", "hardware.count=100000"],
            "hardware.count = 100000: must be a whole number from 1 to 4096",
        ),
        (["plan_only=true", "hardware.gpus=h100"], "did you mean 'gpu'"),
    ],
)
def test_mistakes(
    settings: Callable[..., tiny.Tree],
    command: Callable[..., int],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(settings(), *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_sweep_from_python_has_results_or_is_refused(settings: Callable[..., tiny.Tree]) -> None:
    with pytest.raises(ValueError, match="plan_only"):
        plora.sweep(settings(), plan_only=True)
