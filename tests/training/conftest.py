"""Tiny models for the tests of training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from plora.models.base import BaseModel
from tests.training import toy


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoint of each family."""
    return {family: toy.save(family, tmp_path_factory.mktemp(family)) for family in toy.FAMILIES}


@pytest.fixture(params=toy.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def together(folders: dict[str, Path]) -> Callable[[str], toy.Recorder]:
    """What a job of all `toy.mixed_trials` told on a family's model; trained once."""

    @functools.cache
    def run(family: str) -> toy.Recorder:
        trials, tasks = toy.mixed_trials()
        return toy.train(toy.load(folders[family]), trials, tasks)[0]

    return run


@pytest.fixture
def base(folders: dict[str, Path]) -> BaseModel:
    """The tiny Llama."""
    return toy.load(folders["llama"])
