"""Inputs of packed modules on a device, and the products on every implementation. Benchmarks use it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from plora.kernels import cuda, reference
from plora.kernels.dropout import combine, threshold
from plora.kernels.reference import ABSENT, Tables
from plora.kernels.schedule import DeviceTables, Work, one_piece

GAP = 64  # elements of NaN between factors: reading beyond one shows
STANDARD_MIX = [8] * 16 + [16] * 8 + [32] * 4 + [64] * 2 + [128] * 2
INPUT_KEY = combine(12, 34)
# dh and dB in one pass as suits the device; with as many clusters as can be; as suits any device; in two passes; and,
# whatever suits the device, walks as long as can be, but as short as can be where they share sums
FORMS = ("one pass", "many clusters", "without clusters", "apart", "long walks")
MANY = 1 << 20


def ragged(total: int, n: int, seed: int = 0) -> list[int]:
    """``n`` lengths between half and one and a half of the mean, that add up to ``total``."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(n, generator=generator) + 0.5
    edges = (shares.cumsum(0) / shares.sum() * total).round().long()
    return torch.diff(edges, prepend=torch.zeros(1, dtype=torch.long)).tolist()


def packed_tables(
    ranks: Sequence[int], counts: Sequence[int], base_rows: int, dropout: Sequence[float] = ()
) -> tuple[Tables, torch.Tensor]:
    """Tables of adapters of ``ranks`` on ``counts`` rows each, of different scales, and a token index int32 ``[T]``."""
    tables = Tables.empty(len(ranks))
    tables.rows[1:] = torch.tensor([*counts, base_rows]).cumsum(0)
    tables.rank[:] = torch.tensor(ranks)
    tables.scale[:] = 2.0 / (1 + torch.arange(len(ranks)) % 3)
    for slot, p in enumerate(dropout):
        tables.limit[slot], tables.key[slot] = threshold(p), combine(slot, 7)
    index = torch.cat([torch.arange(count) for count in (*counts, base_rows)])
    return tables, (index * 3 + 1).to(torch.int32)


@dataclass
class Results:
    """What forward and backward give; ``outs`` are the members'."""

    outs: list[torch.Tensor]
    hidden: torch.Tensor
    dx: torch.Tensor
    grad: torch.Tensor


@dataclass
class Problem:
    """A group of modules of ``d`` inputs and ``n`` outputs each, with adapters of ``ranks`` on ``counts`` rows.

    ``absent``: slots of no member; ``missing``: pairs of a slot and a member. ``replaces``: whether the gradients that
    one piece makes are written, over what was there, rather than added to.
    """

    d: int
    n: int | Sequence[int]
    ranks: Sequence[int]
    counts: Sequence[int]
    base_rows: int = 0
    dropout: Sequence[float] = ()
    absent: frozenset[int] = frozenset()
    missing: frozenset[tuple[int, int]] = frozenset()
    replaces: bool = False
    seed: int = 0
    device: str = "cuda"
    tables: Tables = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self.tables, index = packed_tables(self.ranks, self.counts, self.base_rows, self.dropout)
        self.token_index = index.to(self.device)
        self.widths = [self.n] if isinstance(self.n, int) else list(self.n)
        self.columns = -(-max(self.ranks) // 16) * 16  # of one member
        self._place()
        rows = self.rows
        self.x = self.random(rows, self.d)
        self.ys, self.dys = ([self.random(rows, n) for n in self.widths] for _ in range(2))
        self.grad = torch.randn(self.weight.numel(), device=self.device, generator=self.generator)
        self.device_tables = DeviceTables(torch.device(self.device))
        replaced = one_piece(self.tables).nonzero()[0].tolist() if self.replaces else []
        self.device_tables.update(self.tables, replaced=replaced)
        self.replaced = [span for slot in replaced for span in self._spans(slot)]
        for span in self.replaced:
            self.grad[span] = 0  # what is compared is the difference
        self.work = Work(*self.device_tables.as_list())
        self.device_offsets = self.offsets.to(self.device)

    @property
    def rows(self) -> int:
        return int(self.tables.rows[-1])

    @property
    def members(self) -> int:
        return len(self.widths)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator).bfloat16()

    def lacks(self, slot: int, member: int) -> bool:
        return slot in self.absent or (slot, member) in self.missing

    def _place(self) -> None:
        k, at = len(self.ranks), GAP
        self.offsets = torch.full((self.members, 2 * k + 1), ABSENT, dtype=torch.int64)
        self.offsets[:, -1] = INPUT_KEY
        spans = []
        for slot, rank in enumerate(self.ranks):
            for member, n in enumerate(self.widths):
                if self.lacks(slot, member):
                    continue
                for half, width in ((0, self.d), (k, n)):
                    self.offsets[member, half + slot] = at
                    spans.append((at, rank * width, width**-0.5))
                    at = -(-(at + rank * width + GAP) // 64) * 64
        self.weight = torch.full((at,), float("nan"), device=self.device, dtype=torch.bfloat16)
        for start, numel, std in spans:
            self.weight[start : start + numel] = self.random(numel) * std

    def _spans(self, slot: int) -> list[slice]:
        """Where the slot's factors lie in the arena."""
        sides = ((slot, [self.d] * self.members), (len(self.ranks) + slot, self.widths))
        starts = [
            (int(self.offsets[member, column]), width)
            for column, widths in sides
            for member, width in enumerate(widths)
        ]
        return [slice(start, start + self.ranks[slot] * width) for start, width in starts if start != ABSENT]

    def _initial_grad(self) -> torch.Tensor:
        grad = self.grad.clone()
        for span in self.replaced:
            grad[span] = float("nan")
        return grad

    def reference(self, dtype: torch.dtype) -> Results:
        """In plain torch, computed in ``dtype``."""
        x, weight = self.x.to(dtype), self.weight.to(dtype)
        ys, dys = ([t.to(dtype) for t in tensors] for tensors in (self.ys, self.dys))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grad = torch.zeros(weight.numel(), device=self.device, dtype=wide)
        offsets, tables, index = self.offsets, self.tables, self.token_index
        hidden = reference.lora_down(x, weight, offsets, tables, index, self.columns)
        outs = reference.lora_up(ys, hidden, weight, offsets, tables)
        dhidden = reference.lora_up_backward(dys, hidden, weight, grad, offsets, tables)
        dx = reference.lora_down_grad_input(dhidden, x.shape[1], weight, offsets, tables, index)
        reference.lora_down_grad_factor(dhidden, x, grad, offsets, tables, index)
        return Results(outs, hidden, dx, grad)

    def cuda(self, form: str = "one pass") -> Results:
        """On the kernels, all outputs poisoned before; ``form`` is how dh and dB are made, see ``FORMS``."""
        nan, index, weight, work, grad = float("nan"), self.token_index, self.weight, self.work, self._initial_grad()
        hidden = self.random(self.rows, self.members * self.columns).fill_(nan)
        dhidden, outs, dx = hidden.clone(), [torch.full_like(y, nan) for y in self.ys], torch.full_like(self.x, nan)
        long = form == "long walks"
        cuda.down(self.x, weight, hidden, work, self.device_offsets, index, slots=MANY if long else 0)
        cuda.up(self.ys, hidden, weight, outs, work, self.device_offsets, index, slots=int(long))
        if form == "apart":
            for m, offsets in enumerate(self.device_offsets):
                own_hidden, own_dhidden = (self.of_member(t, m) for t in (hidden, dhidden))
                cuda.down(self.dys[m], weight, own_dhidden, work, offsets, index, backward=True)
                cuda.grad_factor(self.dys[m], own_hidden, grad, work, offsets, index, backward=True)
        else:
            cuda.grad_hidden_and_up(
                self.dys, hidden, weight, dhidden, grad, work, self.device_offsets, index,
                clusters=False if form == "without clusters" else None,
                clusters_per_run=1000 if form == "many clusters" else 0,
            )  # fmt: skip
        cuda.grad_factor(self.x, dhidden, grad, work, self.device_offsets, index)
        cuda.up([None], dhidden, weight, [dx], work, self.device_offsets, index, backward=True, slots=int(long))
        return Results(outs, hidden, dx, grad)

    def of_member(self, hidden: torch.Tensor, member: int) -> torch.Tensor:
        """Its columns ``[T, R]`` of a group's hidden matrix."""
        return hidden[:, member * self.columns : (member + 1) * self.columns]
