"""A tiny checkpoint, tiny data, and sweeps of them that several tests look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import plora
from plora import cli
from plora.checkpoint.layout import SweepLayout
from plora.report.sweep_result import SweepResult
from tests.engine import tiny


class Finished(NamedTuple):
    """A sweep that has run."""

    result: SweepResult
    layout: SweepLayout
    rows: dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "Tiny-Llama-Instruct")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def settings(tmp_path: Path, model: Path, data: Path) -> Callable[..., tiny.Tree]:
    """``tiny.settings`` of a sweep in the test's own folder."""
    return lambda **changes: tiny.settings(tmp_path / "run", model, data, **changes)


def run(tree: tiny.Tree, **overrides: Any) -> Finished:
    result = plora.sweep(tree, **overrides)
    return Finished(result, SweepLayout(result.output_dir), result.results.set_index("trial").to_dict("index"))


@pytest.fixture(scope="session")
def by_loss(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Finished:
    """Four trials of mixed settings on two data sets, by validation loss."""
    output_dir = tmp_path_factory.mktemp("by_loss") / "run"
    return run(tiny.settings(output_dir, model, data, **tiny.two_datasets(data)))


@pytest.fixture(scope="session")
def by_answers(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Finished:
    """One trial that learns its twelve answers and three that do not, by exact match; only the best one generates."""
    output_dir = tmp_path_factory.mktemp("by_answers") / "run"
    learner = {"rank": 8, "lr": 3e-2, "batch_size": 12, "max_steps": 40, "target_modules": "all-linear"}
    changes = {
        "trial": {"rank": 2, "lr": 1e-3, "max_steps": 2},
        "search": {"trials": [{"lr": 2e-3}, learner, {"lr": 3e-3}]},
        "objective": {"metric": "exact_match"},
        "evaluation": {"every": None, "generation": {"top_k": 1, "max_new_tokens": 6, "max_examples": 3}},
        "dataset_val": {"source": str(data / "val.jsonl")},
        "export": {"keep": 1},
    }
    return run(tiny.settings(output_dir, model, data, **changes))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``plora run --config`` of a YAML file with these settings, in this process."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "recipes"))

    def run_command(tree: tiny.Tree, *arguments: Any) -> int:
        file = tmp_path / "my.yaml"
        file.write_text(json.dumps(tree))
        return cli.main(["run", "--config", str(file), *arguments])

    return run_command


@pytest.fixture(scope="session", autouse=True)
def _profiles_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sweeps neither read nor write the profiles of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("profiles")
        patch.setattr("plora.engine.costs.profile_folder", lambda: folder)
        yield
