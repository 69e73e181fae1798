from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from plora.config.mistakes import Findings
from plora.search.space import decode, encode, grid_values, is_multiple, n_combinations, parse_space


def parse(**raw: Any) -> dict[str, Any]:
    findings = Findings()
    space = parse_space(raw, "space", findings)
    assert not findings.mistakes, findings.mistakes
    return space


@pytest.mark.parametrize(
    ("name", "raw", "distribution"),
    [
        ("lr", 1e-4, CategoricalDistribution([1e-4])),
        ("lr", [1e-4, 1e-3], CategoricalDistribution([1e-4, 1e-3])),
        ("lr", {"low": 1e-5, "high": 1e-3, "log": True}, FloatDistribution(1e-5, 1e-3, log=True)),
        ("dropout", {"low": 0, "high": 0.2, "step": 0.05}, FloatDistribution(0.0, 0.2, step=0.05)),
        ("rank", {"low": 1, "high": 64, "log": True}, IntDistribution(1, 64, log=True)),
        ("rank", {"low": 8, "high": 64, "step": 8}, IntDistribution(8, 64, step=8)),
        ("rank", {"low": 8, "high": 21, "step": 8}, IntDistribution(8, 16, step=8)),
        ("max_grad_norm", [None, 1.0], CategoricalDistribution([None, 1.0])),
        ("rslora", [True, False], CategoricalDistribution([True, False])),
        ("betas", [0.9, 0.99], CategoricalDistribution(["[0.9, 0.99]"])),
        ("betas", [[0.9, 0.99], [0.8, 0.9]], CategoricalDistribution(["[0.9, 0.99]", "[0.8, 0.9]"])),
        ("target_modules", "all-linear", CategoricalDistribution(["all-linear"])),
        ("target_modules", ["v_proj", "q_proj"], CategoricalDistribution(['["q_proj", "v_proj"]'])),
        ("target_modules", ["all-linear", ["q_proj"]], CategoricalDistribution(["all-linear", '["q_proj"]'])),
        ("dataset.max_examples", {"low": 10, "high": 20}, IntDistribution(10, 20)),
        ("dataset.noise", {"low": 0, "high": 1, "step": 0.25}, FloatDistribution(0, 1, step=0.25)),
    ],
)
def test_distributions(name: str, raw: Any, distribution: Any) -> None:
    assert parse(**{name: raw}) == {name: distribution}


def test_data_options_may_be_nested() -> None:
    assert parse(dataset={"max_examples": [1, 2]}) == {"dataset.max_examples": CategoricalDistribution([1, 2])}


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(VALUES | st.lists(VALUES, max_size=3) | st.dictionaries(st.text(), VALUES, max_size=3))
def test_what_is_encoded_is_plain_and_comes_back(value: Any) -> None:
    encoded = encode(value)
    assert encoded is None or isinstance(encoded, (bool, int, float, str))
    assert decode("dataset.option", encoded) == value


@given(st.sampled_from([0.1, 0.05, 0.25, 3.0]), st.integers(0, 50))
def test_multiples(step: float, count: int) -> None:
    assert is_multiple(step * count, step)
    assert not is_multiple(step * (count + 0.5), step)


def test_grid_values_and_combinations() -> None:
    space = parse(rank={"low": 8, "high": 24, "step": 8}, dropout={"low": 0, "high": 0.3, "step": 0.1}, lr=[1e-4, 1e-3])
    assert grid_values(space["rank"]) == [8, 16, 24]
    assert grid_values(space["dropout"]) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert n_combinations(space) == 24
    assert n_combinations(parse(rank={"low": 1, "high": 16, "log": True})) == 16
    assert n_combinations(parse(lr={"low": 0.1, "high": 0.2})) == float("inf")
    assert grid_values(parse(lr={"low": 0.1, "high": 0.2})["lr"]) is None


def test_combinations_are_counted_without_listing_them() -> None:
    many = {"low": 1, "high": 10**15}  # a list of them is refused at once: no memory is as large
    assert n_combinations(parse(**{"dataset.seed": many})) == 10**15
    assert n_combinations(parse(**{"dataset.seed": {**many, "step": 10}})) == 10**14
    assert n_combinations(parse(lr={"low": 1e-14, "high": 10, "step": 1e-14})) == pytest.approx(10**15)
    assert n_combinations({"lr": FloatDistribution(0.1, 0.1)}) == 1
