"""One packed module's inputs on a device, and the products on every implementation. Benchmarks use it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from plora.kernels import cuda, reference
from plora.kernels.dropout import combine, threshold
from plora.kernels.reference import ABSENT, Tables
from plora.kernels.schedule import DeviceTables

GAP = 64  # elements of NaN between factors: reading beyond one shows
STANDARD_MIX = [8] * 16 + [16] * 8 + [32] * 4 + [64] * 2 + [128] * 2
INPUT_KEY = combine(12, 34)
# dh and dB in one pass as suits the device; with as many clusters as can be; as suits any device; in two passes
FORMS = ("one pass", "many clusters", "without clusters", "apart")


def ragged(total: int, n: int, seed: int = 0) -> list[int]:
    """``n`` lengths between half and one and a half of the mean, that add up to ``total``."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(n, generator=generator) + 0.5
    edges = (shares.cumsum(0) / shares.sum() * total).round().long()
    return torch.diff(edges, prepend=torch.zeros(1, dtype=torch.long)).tolist()


@dataclass
class Results:
    """What forward and backward give."""

    out: torch.Tensor
    hidden: torch.Tensor
    dx: torch.Tensor
    grad: torch.Tensor


@dataclass
class Problem:
    """A module of ``d`` inputs and ``n`` outputs, with adapters of ``ranks`` on ``counts`` rows each."""

    d: int
    n: int
    ranks: Sequence[int]
    counts: Sequence[int]
    base_rows: int = 0
    dropout: Sequence[float] = ()
    absent: frozenset[int] = frozenset()
    seed: int = 0
    device: str = "cuda"
    tables: Tables = field(init=False)

    def __post_init__(self) -> None:
        k = len(self.ranks)
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.tables = Tables.empty(k)
        self.tables.rows[1:] = torch.tensor([*self.counts, self.base_rows]).cumsum(0)
        self.tables.rank[:] = torch.tensor(self.ranks)
        self.tables.scale[:] = 2.0 / (1 + torch.arange(k) % 3)
        for slot, p in enumerate(self.dropout):
            self.tables.limit[slot], self.tables.key[slot] = threshold(p), combine(slot, 7)
        self.columns = -(-max(self.ranks) // 16) * 16
        self._place()
        rows = self.rows
        index = torch.cat([torch.arange(c) for c in (*self.counts, self.base_rows)])
        self.token_index = (index * 3 + 1).to(self.device, torch.int32)
        self.x, self.y, self.dy = self.random(rows, self.d), self.random(rows, self.n), self.random(rows, self.n)
        self.grad = torch.randn(self.weight.numel(), device=self.device, generator=self.generator)
        self.device_tables = DeviceTables(torch.device(self.device))
        self.device_tables.update(self.tables)
        self.work = cuda._Work(*self.device_tables.as_list(), self.offsets.to(self.device))

    @property
    def rows(self) -> int:
        return int(self.tables.rows[-1])

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).bfloat16()

    def _place(self) -> None:
        k, at = len(self.ranks), GAP
        self.offsets = torch.full((2 * k + 1,), ABSENT, dtype=torch.int64)
        self.offsets[-1] = INPUT_KEY
        spans = []
        for slot, rank in enumerate(self.ranks):
            if slot in self.absent:
                continue
            for half, width in ((0, self.d), (k, self.n)):
                self.offsets[half + slot] = at
                spans.append((at, rank * width, width**-0.5))
                at = -(-(at + rank * width + GAP) // 64) * 64
        self.weight = torch.full((at,), float("nan"), device=self.device, dtype=torch.bfloat16)
        for start, numel, std in spans:
            self.weight[start : start + numel] = self.random(numel) * std

    def reference(self, dtype: torch.dtype) -> Results:
        """In plain torch, computed in ``dtype``."""
        x, y, dy, weight = (t.to(dtype) for t in (self.x, self.y, self.dy, self.weight))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grad = torch.zeros(weight.numel(), device=self.device, dtype=wide)
        out, hidden = reference.lora_add(x, y, weight, self.offsets, self.tables, self.token_index, self.columns)
        dx = reference.lora_add_backward(dy, x, hidden, weight, grad, self.offsets, self.tables, self.token_index, True)
        return Results(out, hidden, dx, grad)

    def cuda(self, form: str = "one pass") -> Results:
        """On the kernels, all outputs poisoned before; ``form`` is how dh and dB are made, see ``FORMS``."""
        nan, index, weight = float("nan"), self.token_index, self.weight
        hidden = torch.full((self.rows, self.columns), nan, device=self.device, dtype=torch.bfloat16)
        dhidden, out, dx = hidden.clone(), torch.full_like(self.y, nan), torch.full_like(self.x, nan)
        grad = self.grad.clone()
        cuda.down(self.x, weight, hidden, self.work, index)
        cuda.up(self.y, hidden, weight, out, self.work, index)
        if form == "apart":
            cuda.down(self.dy, weight, dhidden, self.work, index, backward=True)
            cuda.grad_factor(self.dy, hidden, grad, self.work, index, backward=True)
        else:
            cuda.grad_hidden_and_up(
                self.dy, hidden, weight, dhidden, grad, self.work, index,
                clusters=False if form == "without clusters" else None,
                clusters_per_run=1000 if form == "many clusters" else 0,
            )  # fmt: skip
        cuda.grad_factor(self.x, dhidden, grad, self.work, index)
        cuda.up(None, dhidden, weight, dx, self.work, index, backward=True)
        return Results(out, hidden, dx, grad)
