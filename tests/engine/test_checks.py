"""What stops a sweep before it trains, as a user of ``plora run`` meets it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plora.checkpoint.layout import SweepLayout
from plora.config import load
from plora.engine import costs
from tests.engine import tiny
from tests.engine.conftest import Finished

Command = Callable[..., int]
Settings = Callable[..., tiny.Tree]


@pytest.fixture
def refused(command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """What ``plora run`` says on its way out; it must not have left what would stand in the way of the next try."""

    def run_and_read(tree: tiny.Tree, *arguments: str) -> str:
        assert command(tree, *arguments) == 2
        said = capsys.readouterr()
        assert said.err.startswith("plora: ")
        assert "Traceback" not in said.err
        output = tmp_path / "run"
        assert not SweepLayout(output).holds_sweep()
        assert {path.name for path in output.iterdir()} <= {"log.txt"} if output.exists() else True
        return said.err

    return run_and_read


@pytest.fixture
def own_model(model: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to spoil."""
    return Path(shutil.copytree(model, tmp_path / "Spoilt-Llama-Instruct"))


def source(folder: Path) -> tiny.Tree:
    return {"source": str(folder), "dtype": "fp32"}


def test_a_directory_that_holds_a_sweep_is_left_alone(
    by_loss: Finished, settings: Settings, refused: Callable[..., str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in by_loss.layout.root.rglob("*")}
    said = refused(settings(), f"output_dir={by_loss.layout.root}")
    assert "already holds a sweep" in said
    assert {path: path.stat().st_mtime_ns for path in by_loss.layout.root.rglob("*")} == before


def test_a_target_that_this_model_lacks(settings: Settings, refused: Callable[..., str]) -> None:
    said = refused(settings(), "trial.target_modules=[q_proj,W_pack]")
    assert "W_pack" in said
    assert "q_proj" in said
    assert "used by default, t003" in said


def test_a_column_that_the_rows_lack(settings: Settings, refused: Callable[..., str]) -> None:
    said = refused(settings(), "dataset.column_map.input=quetsion")
    assert "there is no column 'quetsion'; did you mean 'question'?" in said


def test_an_objective_that_judges_answers_needs_them_generated(settings: Settings, refused: Callable[..., str]) -> None:
    said = refused(settings(), "objective={metric: tests.engine.tiny.shares_letters, direction: maximize}")
    assert "needs evaluation.generation" in said


def test_generation_that_nothing_asks_for_is_reported(settings: Settings) -> None:
    tree = settings(evaluation={"generation": {"max_new_tokens": 4}})
    (warning,) = load(tree).warnings
    assert warning.startswith("evaluation.generation: has no effect: val_loss needs no answers")
    assert load(settings(evaluation={"generation": {"every": 0.5}})).warnings == ()


def test_weights_that_cannot_be_had_are_noticed_before_there_is_a_sweep(
    settings: Settings, refused: Callable[..., str]
) -> None:
    assert "the hub is down" in refused(settings(), "model._component_=tests.engine.tiny.no_weights")


@pytest.mark.parametrize("damage", ["truncated", "header", "missing", "shape"])
def test_a_damaged_weights_file_is_named(
    settings: Settings, refused: Callable[..., str], own_model: Path, damage: str
) -> None:
    weights = own_model / "model.safetensors"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[:-100])
    elif damage == "header":
        weights.write_bytes(content[:8] + b"#" * 40 + content[48:])
    elif damage == "missing":
        weights.unlink()
    else:
        config = own_model / "config.json"
        config.write_text(config.read_text().replace('"intermediate_size": 24', '"intermediate_size": 32'))
    said = refused(settings(model=source(own_model)))
    assert ("gate_proj" if damage == "shape" else "model.safetensors") in said
    assert said.startswith("plora: 1 mistake")


def test_mistakes_in_the_file_and_against_model_and_data_come_in_one_list(
    settings: Settings, refused: Callable[..., str]
) -> None:
    wrong = ["trial.target_modules=[W_pack]", "tokenizer.max_seq_len=1000", "dataset.column_map.output=anser"]
    said = refused(settings(), *wrong, "expotr.keep=1", "packing.solver=Gurobi")
    assert said.startswith("plora: 5 mistakes in ")
    for part in ("W_pack", "max_seq_len = 1000", "'anser'; did you mean 'answer'", "'export'", "Gurobi"):
        assert part in said, part


def test_mistakes_that_only_this_machine_shows_come_in_one_list(
    settings: Settings, refused: Callable[..., str], own_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (own_model / "model.safetensors").write_bytes(b"")
    loggers = [
        {"_component_": "tests.engine.tiny.Broken", "methd": "log"},
        {"_component_": "plora.AdapterConfig", "rank": 4},
    ]
    search = {"trials": [{"dataset.max_examples": 0}]}
    tokenizer = {"source": str(own_model.parent / "nowhere"), "max_seq_len": 128}
    tree = settings(model=source(own_model), metric_logger=loggers, device="cuda", tokenizer=tokenizer, search=search)
    said = refused(tree)
    assert said.startswith("plora: 6 mistakes in ")
    for part in (
        "dataset.max_examples",
        "no CUDA device",
        "model.safetensors",
        "methd",
        "none of plora's trackers",
        "nowhere",
    ):
        assert part in said, part


def test_a_trial_that_does_not_fit_is_refused_with_the_numbers(
    settings: Settings, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "host_free_bytes", lambda: 2**20)
    said = refused(settings())
    assert "MiB" in said
    assert "t001" in said


def test_rows_that_the_model_has_no_positions_for(settings: Settings, refused: Callable[..., str], data: Path) -> None:
    rows = tiny.save_rows(data / "long.jsonl", range(6), ask="What is {}" + " again" * 400 + "?")
    said = refused(settings(), f"dataset.source={rows}", "tokenizer.max_seq_len=null")
    assert "data set 'dataset': its longest example has" in said
    assert "set tokenizer.max_seq_len to 256 or less" in said


def test_a_batch_larger_than_the_data_is_reported(settings: Settings, command: Command, tmp_path: Path) -> None:
    assert command(settings(), "search.trials=[{batch_size: 13}]", "trial.max_steps=1", "export.keep=0") == 0
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "batch_size 13 is above the 12 training examples of data set 'dataset'" in said
    assert "(used by t001)" in said


def test_rows_that_are_too_long_are_refused_and_the_corrected_sweep_runs(
    settings: Settings, refused: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    short = ["search.trials=[{rank: 2}]", "trial.max_steps=1", "export.keep=0"]
    said = refused(settings(), *short, "tokenizer.max_seq_len=5")
    assert "none of its 12 examples can be used" in said
    assert (tmp_path / "run" / "log.txt").exists()
    assert command(settings(), *short) == 0
    assert (tmp_path / "run" / "results.csv").exists()
