"""The grouped products equal the reference: ragged rows, mixed ranks, absent adapters, dropout."""

from __future__ import annotations

import pytest
import torch

from plora.kernels import grouped, reference, swiglu
from plora.kernels.dropout import combine, threshold
from plora.kernels.reference import ABSENT, Tables

COUNTS, RANKS, BASE_ROWS, R = [5, 0, 1, 70, 8, 9], [3, 4, 16, 40, 1, 7], 3, 48


class Problem:
    """Two linears of one input and one after them, in float32; the grouped products get it in bf16.

    ``places``: the slot of each adapter's factors in a linear, and where they lie.
    """

    def __init__(self, dropout: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tables = Tables.empty(len(RANKS))
        self.tables.rows[1:] = torch.tensor([*COUNTS, BASE_ROWS]).cumsum(0)
        self.tables.rank[:] = torch.tensor(RANKS)
        self.tables.scale[:] = torch.linspace(0.5, 2, len(RANKS))
        if dropout:
            self.tables.limit[2:4], self.tables.key[2:4] = threshold(0.4), torch.tensor([5, 6])
        at, places = 0, []
        self.offsets = torch.full((3, 2 * len(RANKS) + 1), ABSENT)
        self.offsets[:, -1] = torch.tensor([combine(1), combine(1), combine(2)])
        for module, (d, n) in enumerate([(32, 24), (32, 24), (24, 40)]):
            for slot, rank in enumerate(RANKS):
                if (module, slot) in ((1, 3), (2, 0), (0, 5)):
                    continue
                self.offsets[module, slot], self.offsets[module, len(RANKS) + slot] = at, at + rank * d
                places.append((slot, slice(at, at + rank * (d + n))))
                at += rank * (d + n)
        rows = sum(COUNTS) + BASE_ROWS

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).bfloat16().float()

        self.weight, self.grad = random(at) * 0.25, random(at)
        self.places = places
        self.x, self.gate, self.up, self.dact = (random(rows, w) for w in (32, 24, 24, 24))
        self.index = torch.arange(rows, dtype=torch.int32)

    def run(self, products, dtype: torch.dtype) -> list[torch.Tensor]:
        x, gate, up, dact, weight = (t.to(dtype) for t in (self.x, self.gate, self.up, self.dact, self.weight))
        grad, both, last, tables = self.grad.clone(), self.offsets[:2], self.offsets[2:], self.tables
        hidden = products.lora_down(x, weight, both, tables, self.index, R)
        args = (weight, both, last, tables, self.index)
        act, low = swiglu.lora_swiglu(products, gate, up, hidden, *args, R)
        dgate, dup, dhidden = swiglu.lora_swiglu_backward(
            products, dact, low, gate, up, hidden, weight, grad, *args[1:]
        )  # fmt: skip
        dx = products.lora_down_grad_input(dhidden, x.shape[1], weight, both, tables, self.index)
        products.lora_down_grad_factor(dhidden, x, grad, both, tables, self.index)
        return [hidden, act, low, dgate, dup, dhidden, dx, grad]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equals_the_reference(dropout, device):
    problem = Problem(dropout)
    exact = problem.run(reference, torch.float32)
    for name in ("x", "gate", "up", "dact", "weight", "grad", "index"):
        setattr(problem, name, getattr(problem, name).to(device))
    plain, ours = (problem.run(products, torch.bfloat16) for products in (reference, grouped))
    for expected, one, other in zip(exact, plain, ours, strict=True):
        error, allowed = (other.cpu() - expected).norm(), (one.cpu() - expected).norm()
        assert error <= 2 * allowed + 1e-6, (error, allowed)


def test_serves_what_the_product_takes():
    assert not grouped.serves(torch.zeros(3, 16, dtype=torch.bfloat16))  # not on a GPU
