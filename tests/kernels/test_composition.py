"""What surrounds the kernels, on a machine without a GPU: the right kernel is called with the right arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from plora.kernels import cuda, cuda_swiglu, ops, reference
from plora.kernels.schedule import DeviceTables
from tests.kernels import emulator
from tests.kernels.test_grouped import Problem, R

CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(params=[True, False], ids=["clusters", "no clusters"])
def _emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cuda, cuda_swiglu):
        monkeypatch.setattr(module, "kernels", lambda: emulator.module(request.param))


def through_ops(problem: Problem, replaced: Collection[int] = ()) -> list[torch.Tensor]:
    """The operators of a gated MLP, forward and backward, as the layers call them where the kernels run."""
    tables, index = problem.tables, problem.index
    device_tables = DeviceTables(torch.device("cpu"))
    device_tables.update(tables, replaced=replaced)
    both, last = problem.offsets[:2], problem.offsets[2:]
    x, gate, up, dact, weight = (
        t.bfloat16() for t in (problem.x, problem.gate, problem.up, problem.dact, problem.weight)
    )
    buffer = ops.GradientBuffer(problem.grad.clone())
    lists, there = tables.as_list(), device_tables.as_list()
    routed, anchor = torch.ones(1, dtype=torch.bool), torch.zeros(1)
    handle = buffer.handle
    hidden = ops.lora_down(x, anchor, weight, handle, routed, both, lists, [*there, both], index, R)
    act, low = ops.lora_swiglu(gate, up, hidden, weight, handle, both, last, lists, [*there, both, last], index, R)
    dgate, dup, dhidden = ops.lora_swiglu_backward(
        dact, low, gate, up, hidden, weight, handle, both, last, lists, [*there, both, last], index
    )
    dx = ops.lora_down_grad_input(dhidden, x.shape[1], weight, both, lists, [*there, both], index)
    ops.lora_down_grad_factor(dhidden, x, handle, both, lists, [*there, both], index)
    hidden, dhidden = (each.where(written(problem, both), 0) for each in (hidden, dhidden))
    return [hidden, act, low.where(written(problem, last), 0), dgate, dup, dhidden, dx, buffer.tensor]


def written(problem: Problem, offsets: torch.Tensor) -> torch.Tensor:
    """Which elements of a hidden matrix ``[T, n R]`` are; nobody reads the others."""
    starts, mask = problem.tables.rows.tolist(), torch.zeros(len(problem.x), len(offsets) * R, dtype=torch.bool)
    for member, places in enumerate(offsets.tolist()):
        for slot, rank in enumerate(problem.tables.rank.tolist()):
            if places[slot] >= 0:
                mask[starts[slot] : starts[slot + 1], member * R : member * R + rank] = True
    return mask


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.usefixtures("_emulated")
def test_equals_the_reference(dropout: bool, deterministic: bool) -> None:
    problem = Problem(dropout)
    torch.use_deterministic_algorithms(deterministic)
    try:
        ours = through_ops(problem)
    finally:
        torch.use_deterministic_algorithms(False)
    exact, plain = (problem.run(reference, dtype) for dtype in (torch.float32, torch.bfloat16))
    for mine, one, other in zip(ours, exact, plain, strict=True):
        assert (mine - one).norm() <= 2 * (other - one).norm() + 1e-6


@pytest.mark.usefixtures("_emulated")
def test_gradients_are_replaced_where_that_was_asked_for() -> None:
    problem, replaced = Problem(False), (0, 3, 5)
    *_, sums = through_ops(problem)
    added = sums - problem.grad
    taken = torch.zeros(len(sums), dtype=torch.bool)
    for slot, span in problem.places:
        taken[span] = slot in replaced
    taken &= added != 0  # the last linear's B has no part in this
    problem.grad[taken] = torch.nan
    *_, got = through_ops(problem, replaced)
    torch.testing.assert_close(got, added.where(taken, sums), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_kernels", [False, True])
@pytest.mark.usefixtures("_emulated")
def test_a_residual_is_added(on_kernels: bool) -> None:
    problem = Problem(False)
    tables, index, gate = problem.tables, problem.index, problem.offsets[:1]
    device_tables = DeviceTables(torch.device("cpu"))
    device_tables.update(tables)
    device = [*device_tables.as_list(), gate] if on_kernels else []
    y, residual, weight = (t.bfloat16() for t in (problem.gate, problem.up, problem.weight))
    hidden = reference.lora_down(problem.x, problem.weight, gate, tables, index, R)
    (exact,) = reference.lora_up([y.float()], hidden, problem.weight, gate, tables)
    (out,) = ops.lora_up(
        [y],
        residual,
        hidden.bfloat16(),
        weight,
        torch.zeros(1, dtype=torch.int64),
        gate,
        tables.as_list(),
        device,
        index,
    )
    torch.testing.assert_close(out.float(), exact + residual, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "name", ["down", "up", "grad_factor", "grad_hidden", "swiglu", "swiglu_pointwise_grad", "swiglu_grad"]
)
def test_the_emulator_takes_what_the_bindings_take(name: str) -> None:
    text = " ".join(path.read_text() for path in CSRC.glob("*bindings.cpp"))
    found = re.search(rf'm\.def\("{name}".*?\);', text, flags=re.DOTALL)
    assert found is not None
    assert re.findall(r'arg\("(\w+)"\)', found[0]) == list(inspect.signature(getattr(emulator, name)).parameters)
