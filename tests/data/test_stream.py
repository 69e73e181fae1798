"""The stream is a pure function of the step and passes over every example."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plora.data.stream import ExampleStream


@given(n=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(0, 2**40), epoch=st.integers(0, 3))
def test_an_epoch_has_every_example_once(n: int, size: int, seed: int, epoch: int) -> None:
    stream = ExampleStream(n, size, seed)
    steps = range(epoch * stream.steps_per_epoch, (epoch + 1) * stream.steps_per_epoch)
    batches = [stream.batch(step) for step in steps]
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(batches[-1]) == n - size * (len(batches) - 1)


def test_a_step_does_not_depend_on_earlier_ones() -> None:
    in_order = [ExampleStream(50, 8, 3).batch(step) for step in range(20)]
    stream = ExampleStream(50, 8, 3)
    backwards = [stream.batch(step) for step in reversed(range(20))]
    assert in_order == backwards[::-1]


def test_order_differs_by_epoch_and_seed() -> None:
    stream = ExampleStream(64, 64, 3)
    assert stream.batch(0) != stream.batch(1)
    assert stream.batch(0) != ExampleStream(64, 64, 4).batch(0)


def test_callers_cannot_change_the_order() -> None:
    stream = ExampleStream(8, 8, 0)
    want = list(stream.batch(0))
    stream.batch(0).clear()
    assert stream.batch(0) == want


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_arguments_out_of_range(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"got (0|-1)"):
        ExampleStream(*arguments)
