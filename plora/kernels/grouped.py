"""The packed LoRA products in plain torch for a GPU without our kernels: one grouped product for all adapters.

bf16 only. Every adapter's factors are padded to the widest rank and stacked, which costs a copy of them and the
products of the padding, but no loop over adapters launches products. Shapes as in ``reference``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plora.kernels.dropout import combine, scaled_mask
from plora.kernels.reference import ABSENT, Tables
from plora.kernels.schedule import upload

_ALIGNMENT = 8  # elements: torch's grouped product reads rows by 16 bytes


def serves(*tensors: torch.Tensor) -> bool:
    """Whether activations ``[T, width]`` of this kind can be multiplied here; the reference takes all others."""
    return hasattr(torch, "_grouped_mm") and all(
        each.is_cuda and each.dtype == torch.bfloat16 and each.shape[1] % _ALIGNMENT == 0 for each in tensors
    )


@dataclass(frozen=True)
class _Rows:
    """Which rows belong to which adapter, on the device.

    Args:
        slots: those with rows.
        ends: int32, where the rows of each of them end.
        count: rows of adapters; those after see the base alone.
        scale: fp32 ``[count, 1]``.
    """

    slots: list[int]
    ends: torch.Tensor
    count: int
    scale: torch.Tensor

    @classmethod
    def of(cls, tables: Tables, device: torch.device) -> _Rows:
        lengths = tables.rows.diff()[:-1]
        slots = torch.nonzero(lengths).flatten()
        scale = tables.scale[slots].float().repeat_interleave(lengths[slots])
        ends = tables.rows[1:-1][slots].to(torch.int32)
        return cls(
            slots.tolist(), upload(ends, device), int(tables.rows[-2]), upload(scale, device)[:, None]
        )  # fmt: skip


@dataclass(frozen=True)
class _Factors:
    """One module's factors, A or B, of all adapters with rows: views into an arena, ``None`` where absent."""

    views: list[torch.Tensor | None]
    max_rank: int
    width: int

    @classmethod
    def of(
        cls, flat: torch.Tensor, begins: list[int], rows: _Rows, tables: Tables, max_rank: int, width: int
    ) -> _Factors:
        ranks = tables.rank.tolist()
        views = [
            None if begins[slot] == ABSENT else flat[begins[slot] : begins[slot] + ranks[slot] * width].view(-1, width)
            for slot in rows.slots
        ]
        return cls(views, max_rank, width)

    def stacked(self, like: torch.Tensor) -> torch.Tensor:
        """``[adapters, R, width]``, zero where there is nothing."""
        stack = like.new_zeros(len(self.views), self.max_rank, self.width)
        pairs = [(stack[i, : len(view)], view) for i, view in enumerate(self.views) if view is not None]
        if pairs:
            torch._foreach_copy_([to for to, _ in pairs], [view for _, view in pairs])
        return stack

    def add(self, stack: torch.Tensor) -> None:
        """Add ``[adapters, R, width]`` to the arena."""
        pairs = [(view, stack[i, : len(view)].to(view.dtype)) for i, view in enumerate(self.views) if view is not None]
        if pairs:
            torch._foreach_add_([view for view, _ in pairs], [part for _, part in pairs])


@dataclass(frozen=True)
class _Module:
    """One linear of a group: its A, its B and its columns of the hidden matrix."""

    a_begins: list[int]
    b_begins: list[int]
    columns: slice


def _modules(offsets: torch.Tensor, max_rank: int) -> list[_Module]:
    slots = offsets.shape[1] // 2
    return [
        _Module(places[:slots], places[slots : 2 * slots], slice(m * max_rank, (m + 1) * max_rank))
        for m, places in enumerate(offsets.tolist())
    ]


def _mask(tables: Tables, offsets: torch.Tensor, token_index: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """Dropout of the group's input ``[T, D]``, None where no adapter has any."""
    if not tables.limit.any():
        return None
    mask, starts, key = torch.ones_like(x), tables.rows.tolist(), int(offsets[0, -1])
    for slot in torch.nonzero(tables.limit).flatten().tolist():
        rows = slice(starts[slot], starts[slot + 1])
        own = combine(int(tables.key[slot]), key)
        mask[rows] = scaled_mask(own, token_index[rows], x.shape[1], int(tables.limit[slot]), x.dtype)
    return mask


def lora_down(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    tables: Tables,
    token_index: torch.Tensor,
    max_rank: int,
) -> torch.Tensor:
    """See ``reference.lora_down``."""
    rows = _Rows.of(tables, x.device)
    mask = _mask(tables, offsets, token_index, x)
    inputs = (x if mask is None else x * mask)[: rows.count]
    hidden = x.new_zeros(x.shape[0], len(offsets) * max_rank)
    for module in _modules(offsets, max_rank):
        a = _Factors.of(weight, module.a_begins, rows, tables, max_rank, x.shape[1]).stacked(x)
        hidden[: rows.count, module.columns] = torch._grouped_mm(inputs, a.transpose(1, 2), offs=rows.ends)
    return hidden


def lora_down_grad_factor(
    dhidden: torch.Tensor,
    x: torch.Tensor,
    grad: torch.Tensor,
    offsets: torch.Tensor,
    tables: Tables,
    token_index: torch.Tensor,
) -> None:
    """See ``reference.lora_down_grad_factor``."""
    rows, max_rank = _Rows.of(tables, x.device), dhidden.shape[1] // len(offsets)
    mask = _mask(tables, offsets, token_index, x)
    inputs = (x if mask is None else x * mask)[: rows.count]
    for module in _modules(offsets, max_rank):
        low = dhidden[: rows.count, module.columns].contiguous()
        da = _Factors.of(grad, module.a_begins, rows, tables, max_rank, x.shape[1])
        da.add(torch._grouped_mm(low.T, inputs, offs=rows.ends))


def lora_down_grad_input(
    dhidden: torch.Tensor,
    width: int,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    tables: Tables,
    token_index: torch.Tensor,
) -> torch.Tensor:
    """See ``reference.lora_down_grad_input``."""
    rows, max_rank = _Rows.of(tables, dhidden.device), dhidden.shape[1] // len(offsets)
    dx = dhidden.new_zeros(dhidden.shape[0], width)
    for module in _modules(offsets, max_rank):
        low = dhidden[: rows.count, module.columns].contiguous()
        a = _Factors.of(weight, module.a_begins, rows, tables, max_rank, width).stacked(dx)
        dx[: rows.count] += torch._grouped_mm(low, a, offs=rows.ends)
    mask = _mask(tables, offsets, token_index, dx)
    return dx if mask is None else dx * mask


def lora_up(
    ys: Sequence[torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, tables: Tables
) -> list[torch.Tensor]:
    """See ``reference.lora_up``."""
    rows, max_rank, outs = _Rows.of(tables, hidden.device), hidden.shape[1] // len(offsets), []
    for y, module in zip(ys, _modules(offsets, max_rank), strict=True):
        low = (hidden[: rows.count, module.columns] * rows.scale).to(y.dtype)
        b = _Factors.of(weight, module.b_begins, rows, tables, max_rank, y.shape[1]).stacked(y)
        out = y.clone()
        out[: rows.count] += torch._grouped_mm(low, b, offs=rows.ends)
        outs.append(out)
    return outs


def lora_up_backward(
    dys: Sequence[torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    offsets: torch.Tensor,
    tables: Tables,
) -> torch.Tensor:
    """See ``reference.lora_up_backward``."""
    rows, max_rank = _Rows.of(tables, hidden.device), hidden.shape[1] // len(offsets)
    dhidden = torch.zeros_like(hidden)
    for dy, module in zip(dys, _modules(offsets, max_rank), strict=True):
        dout = dy[: rows.count]
        b = _Factors.of(weight, module.b_begins, rows, tables, max_rank, dy.shape[1]).stacked(dy)
        dlow = torch._grouped_mm(dout, b.transpose(1, 2), offs=rows.ends)
        dhidden[: rows.count, module.columns] = (dlow * rows.scale).to(dhidden.dtype)
        low = (hidden[: rows.count, module.columns] * rows.scale).to(dy.dtype)
        db = _Factors.of(grad, module.b_begins, rows, tables, max_rank, dy.shape[1])
        db.add(torch._grouped_mm(low.T, dout, offs=rows.ends))
    return dhidden
