"""Events of a sweep, made by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest


@dataclass(frozen=True)
class Adapter:
    rank: int = 8
    alpha: float = 16.0
    seed: int = 0


@dataclass(frozen=True)
class FakeTrial:
    """The fields of plora.search.trial.Trial that reports look at."""

    number: int
    name: str
    adapter: Adapter = Adapter()
    lr: float = 2e-4
    schedule: str = "cosine"
    target: tuple[str, ...] = ("q_proj", "v_proj")
    clip: float | None = None
    params: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    step: int
    total: int = 4
    loss: float = 1.0
    lr: float = 1e-4
    grad_norm: float = 0.5
    tokens: int = 100
    skipped: bool = False


@dataclass(frozen=True)
class Round:
    tokens: int
    seconds: float


@dataclass(frozen=True)
class FakeScore:
    value: float
    stderr: float = math.nan


@dataclass(frozen=True)
class Eval:
    step: int
    scores: dict
    task: str = "dataset"


@dataclass(frozen=True)
class Result:
    """The fields of plora.training.records.TrialResult that reports look at."""

    trial: FakeTrial
    status: str = "completed"
    steps: int = 4
    tokens: int = 400
    seconds: float = 2.0
    train_loss: float = 0.5
    scores: dict = field(default_factory=dict)
    evals: tuple = ()


@pytest.fixture
def make_round():
    return Round


@pytest.fixture
def make_eval():
    def make(step, **scores):
        return Eval(
            step,
            {
                name: FakeScore(*value) if isinstance(value, tuple) else FakeScore(value)
                for name, value in scores.items()
            },
        )

    return make


@pytest.fixture
def make_result(make_eval):
    def make(trial, status="completed", evals=(), **scores):
        return Result(trial, status, scores=make_eval(0, **scores).scores, evals=tuple(evals))

    return make


@pytest.fixture
def make_trial():
    def make(number, rank=8, **settings):
        return FakeTrial(number, "default" if number == 0 else f"t{number:03d}", Adapter(rank=rank), **settings)

    return make


@pytest.fixture
def make_record():
    return Record
