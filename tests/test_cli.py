from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from plora import cli, tune_hook
from plora.checkpoint.disk import DiskFullError

ROOT = Path(__file__).parents[1]


class FakeSweep:
    """Notes the steps; ``fails`` raises an error in one of them."""

    steps: ClassVar[list[str]] = []
    fails: ClassVar[dict[str, BaseException]] = {}

    goes_on = True

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, step: str) -> Any:
        def take() -> bool:
            self.steps.append(step)
            if step in self.fails:
                raise self.fails[step]
            return self.goes_on

        return take


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeSweep]]:
    engine: Any = types.ModuleType("plora.engine")
    engine.Sweep = FakeSweep
    monkeypatch.setitem(sys.modules, "plora.engine", engine)
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    FakeSweep.steps.clear()
    FakeSweep.fails.clear()
    yield FakeSweep
    FakeSweep.fails.clear()


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "my.yaml"
    raw = {"output_dir": str(tmp_path / "run"), "model": {"source": "m"}, "dataset": {"source": "d"}}
    file.write_text(yaml.safe_dump({**raw, "search": {"trials": [{"lr": 1e-3}]}}))
    return file


STEPS = ["setup", "plan", "run", "report", "cleanup"]


@pytest.mark.parametrize("start", ["plora", "recipe"])
def test_run_takes_the_steps_in_order(sweep: type[FakeSweep], config_file: Path, start: str) -> None:
    arguments = ["trial.rank=4", "--config", str(config_file), "~search"]
    if start == "plora":
        status = cli.main(["run", *arguments])
    else:
        status = importlib.import_module("plora_sweep").main(arguments)
    assert status == 0
    assert sweep.steps == STEPS


def test_a_plan_alone_is_not_followed_by_training(
    sweep: type[FakeSweep], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "goes_on", False)
    assert cli.main(["run", "--config", str(config_file), "~search"]) == 0
    assert sweep.steps == ["setup", "plan", "cleanup"]


def test_overrides_reach_the_recipe(sweep: type[FakeSweep], config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sweep, "__init__", lambda self, config: seen.append(config))
    assert cli.main(["run", "--config", str(config_file), "trial.rank=4", "trial.lr=5e-4"]) == 0
    assert [(t.adapter.rank, t.lr) for t in seen[0].trials] == [(4, 5e-4), (4, 1e-3)]


def test_mistakes_go_to_stderr_without_a_traceback(
    sweep: type[FakeSweep], config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--config", str(config_file), "trial.rank=0", "trail.lr=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("plora: 2 mistakes in")
    assert "Traceback" not in captured.err
    assert sweep.steps == []


@pytest.mark.parametrize("step", ["setup", "plan"])
def test_users_errors_before_training_are_messages(
    sweep: type[FakeSweep], config_file: Path, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    sweep.fails[step] = ValueError("the model m is gated: set HF_TOKEN")
    assert cli.main(["run", "--config", str(config_file)]) == 2
    assert capsys.readouterr().err == "plora: the model m is gated: set HF_TOKEN\n"
    assert sweep.steps == [*STEPS[: STEPS.index(step) + 1], "cleanup"]


def test_a_disk_that_cannot_be_written_is_a_message(
    sweep: type[FakeSweep], config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.fails["plan"] = OSError(28, "No space left on device", "run/plan.json")
    assert cli.main(["run", "--config", str(config_file)]) == 2
    assert capsys.readouterr().err == "plora: [Errno 28] No space left on device: 'run/plan.json'\n"


def test_interrupting_before_there_is_a_sweep(
    sweep: type[FakeSweep], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("plora.config.loading.load", interrupt)
    assert cli.main(["run", "--config", str(config_file)]) == 130
    assert sweep.steps == []


def test_errors_in_training_keep_their_traceback_and_clean_up(sweep: type[FakeSweep], config_file: Path) -> None:
    sweep.fails["run"] = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["run", "--config", str(config_file)])
    assert sweep.steps == ["setup", "plan", "run", "cleanup"]


@pytest.mark.parametrize("step", ["run", "report", "cleanup"])
def test_a_disk_that_fills_up_is_a_message(
    sweep: type[FakeSweep], config_file: Path, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    sweep.fails[step] = DiskFullError("output_dir = 'run': make room")
    assert cli.main(["run", "--config", str(config_file)]) == 2
    assert capsys.readouterr().err == "plora: output_dir = 'run': make room\n"
    assert sweep.steps[-1] == "cleanup"


def test_interrupting_cleans_up(sweep: type[FakeSweep], config_file: Path) -> None:
    sweep.fails["run"] = KeyboardInterrupt()
    assert cli.main(["run", "--config", str(config_file)]) == 130
    assert sweep.steps[-1] == "cleanup"


def test_several_processes_are_refused(
    sweep: type[FakeSweep], config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["run", "--config", str(config_file)]) == 2
    assert "leave out --nproc_per_node" in capsys.readouterr().err
    assert sweep.steps == []


def test_ls_and_cp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls"]) == 0
    assert "plora/quickstart  " in capsys.readouterr().out
    assert cli.main(["cp", "plora/quickstart", str(tmp_path / "my.yaml")]) == 0
    assert (tmp_path / "my.yaml").read_text().startswith("# ")
    assert cli.main(["cp", "plora/quickstart", str(tmp_path / "my.yaml")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert cli.main(["cp", "plora/quikstart", str(tmp_path / "other.yaml")]) == 2
    assert "did you mean 'plora/quickstart'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["ls", "--everything"], ["nonsense"], ["run"]])
def test_wrong_usage_exits_with_two(sweep: type[FakeSweep], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["ls"], ["--version"], ["run", "--help"]])
def test_quick_commands_load_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom plora.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print('LOADED', sorted({'torch', 'transformers', 'optuna', 'torchtune'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "recipes")])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_tune_run_finds_the_recipe_and_the_shipped_name(tmp_path: Path) -> None:
    """Through torchtune's own command, from a folder that has nothing to do with the project."""
    plugin = tmp_path / "path" / "plora_plugin-0.dist-info"  # stands for the entry point of an installed plora
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: plora-plugin\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[torch.backends]\nplora = plora.tune_hook:on_torch_import\n")
    path = os.pathsep.join(map(str, [ROOT, ROOT / "recipes", plugin.parent]))
    command = [str(Path(sys.executable).with_name("tune")), "run", "plora_sweep", "--config", "plora/quickstart"]
    done = subprocess.run(
        [*command, "trial.rank=0"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "plora: 1 mistake in plora/quickstart" in done.stderr
    assert "trial.rank = 0" in done.stderr


def test_the_hook_acts_in_tune_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[bool] = []
    monkeypatch.setattr(tune_hook, "restore_torchao_names", lambda: restored.append(True))
    for program, expected in [("/usr/bin/tune", 1), ("train.py", 0), ("", 0), ("/home/tune/x.py", 0)]:
        restored.clear()
        monkeypatch.setattr(sys, "argv", [program])
        tune_hook.on_torch_import()
        assert len(restored) == expected, program
