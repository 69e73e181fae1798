"""The inputs of a gated MLP's packed activation on a device, and its passes on every implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from plora.kernels import cuda_swiglu, reference, swiglu
from plora.kernels.reference import ABSENT, Tables
from plora.kernels.schedule import DeviceTables, Work, one_piece
from tests.kernels.problem import GAP, INPUT_KEY, packed_tables

# All in few passes; put together from the passes of single linears, as where there is dropout.
FORMS = ("fused", "composed", "long walks")


@dataclass
class Results:
    """What forward and backward give."""

    act: torch.Tensor
    hidden_down: torch.Tensor
    dgate: torch.Tensor
    dup: torch.Tensor
    dhidden: torch.Tensor
    grad: torch.Tensor


@dataclass
class SwigluProblem:
    """``width`` features, adapters of ``ranks`` on ``counts`` rows; ``missing``: a slot and 0 gate, 1 up or 2 down.

    ``replaces``: as of ``Problem``.
    """

    width: int
    ranks: Sequence[int]
    counts: Sequence[int]
    base_rows: int = 0
    dropout: Sequence[float] = ()
    missing: frozenset[tuple[int, int]] = frozenset()
    replaces: bool = False
    seed: int = 0
    device: str = "cuda"
    tables: Tables = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.tables, index = packed_tables(self.ranks, self.counts, self.base_rows, self.dropout)
        self.token_index = index.to(self.device)
        self.columns = -(-max(self.ranks) // 16) * 16  # of one linear
        self._place()
        self.gate, self.up, self.dact = (self.random(self.rows, self.width) for _ in range(3))
        self.hidden, self.dhidden_down = self._hidden(2), self._hidden(1)
        self.grad = torch.randn(self.weight.numel(), device=self.device, generator=self.generator)
        self.device_tables = DeviceTables(torch.device(self.device))
        replaced = one_piece(self.tables).nonzero()[0].tolist() if self.replaces else []
        self.device_tables.update(self.tables, replaced=replaced)
        pairs = ((slot, member) for slot in replaced for member in range(3))
        self.replaced = [self.span(*pair) for pair in pairs if pair not in self.missing]
        for span in self.replaced:
            self.grad[span] = 0  # what is compared is the difference
        self.work = Work(*self.device_tables.as_list())
        self.device_offsets = self.offsets.to(self.device)

    @property
    def rows(self) -> int:
        return int(self.tables.rows[-1])

    def rows_of(self, slot: int) -> slice:
        """Slot K: the rows that see the base alone."""
        return slice(int(self.tables.rows[slot]), int(self.tables.rows[slot + 1]))

    def span(self, slot: int, member: int) -> slice:
        """Where its factor, B of gate and up and A of down, lies in the arena."""
        start = int(self.offsets[member, slot])
        return slice(start, start + self.ranks[slot] * self.width)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).bfloat16()

    def _place(self) -> None:
        k, at = len(self.ranks), GAP
        self.offsets = torch.full((3, 2 * k + 1), ABSENT, dtype=torch.int64)
        self.offsets[:, -1] = INPUT_KEY
        for slot, rank in enumerate(self.ranks):
            for member in range(3):
                if (slot, member) not in self.missing:
                    # The halves that these passes do not read must not be absent.
                    self.offsets[member, slot] = self.offsets[member, k + slot] = at
                    at = -(-(at + rank * self.width + GAP) // 64) * 64
        self.weight = torch.full((at,), float("nan"), device=self.device, dtype=torch.bfloat16)
        for slot, rank in enumerate(self.ranks):
            for member in range(3):
                if (slot, member) not in self.missing:
                    std = rank**-0.5 if member < 2 else self.width**-0.5
                    self.weight[self.span(slot, member)] = self.random(rank * self.width) * std

    def _hidden(self, members: int) -> torch.Tensor:
        """What the kernels may rely on: ranks, then zeros to the next multiple of 16. The rest is NaN."""
        hidden = self.random(self.rows, members * self.columns).fill_(float("nan"))
        for slot, rank in enumerate(self.ranks):
            for member in range(members):
                if (slot, member + 3 - members if members == 1 else member) in self.missing:
                    continue
                own = hidden[self.rows_of(slot), member * self.columns :]
                own[:, : -(-rank // 16) * 16] = 0
                own[:, :rank] = self.random(len(own), rank)
        return hidden

    def reference(self, dtype: torch.dtype) -> Results:
        """In plain torch, computed in ``dtype``."""
        names = ("gate", "up", "dact", "hidden", "dhidden_down", "weight")
        gate, up, dact, hidden, dhidden_down, weight = (getattr(self, name).to(dtype) for name in names)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grad = torch.zeros(weight.numel(), device=self.device, dtype=wide)
        offsets, down, tables, index = self.offsets[:2], self.offsets[2:], self.tables, self.token_index
        act, hidden_down = swiglu.lora_swiglu(
            reference, gate, up, hidden, weight, offsets, down, tables, index, self.columns
        )
        dgate, dup, dhidden = swiglu.lora_swiglu_backward(
            reference, dact, dhidden_down, gate, up, hidden, weight, grad, offsets, down, tables, index
        )
        return Results(act, hidden_down, dgate, dup, dhidden, grad)

    def cuda(self, form: str = "fused") -> Results:
        """On the kernels; the outputs of the fused ones poisoned before."""
        offsets, down = self.device_offsets[:2], self.device_offsets[2:]
        index, grad = self.token_index, self.grad.clone()
        for span in self.replaced:
            grad[span] = float("nan")
        inputs = (self.gate, self.up, self.hidden, self.weight)
        if form == "composed":
            act, hidden_down = cuda_swiglu.lora_swiglu(
                *inputs, self.work, offsets, down, index, self.columns, has_dropout=True
            )
            dgate, dup, dhidden = cuda_swiglu.lora_swiglu_backward(
                self.dact, self.dhidden_down, *inputs, grad, self.work, offsets, down, index, has_dropout=True
            )
            return Results(act, hidden_down, dgate, dup, dhidden, grad)
        act, dgate, dup = (torch.full_like(self.gate, float("nan")) for _ in range(3))
        hidden_down, dhidden = (torch.full_like(t, float("nan")) for t in (self.dhidden_down, self.hidden))
        cuda_swiglu.swiglu(*inputs, act, hidden_down, self.work, offsets, down)
        cuda_swiglu.swiglu_grad(
            self.dact, self.dhidden_down, *inputs, grad, dgate, dup, dhidden, self.work, offsets, down, index,
            steps=6 if form == "long walks" else 0,
        )  # fmt: skip
        return Results(act, hidden_down, dgate, dup, dhidden, grad)
