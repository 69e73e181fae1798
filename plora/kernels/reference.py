"""The packed LoRA products in plain torch: the definition that every other backend is held to.

A run of rows of ``x`` belongs to each adapter. A *group* is one to three linear layers that read the same
input: the products that touch it are made for all of them at once. The loop is over adapters and touches
only the small factors: no product per adapter is ever as wide as the base's.

Shapes: ``T`` packed tokens, ``D`` in-features, ``N`` out-features,
``R`` the widest rank of the pack rounded up to 16, ``r`` an adapter's rank, ``t`` its tokens, ``K`` slots,
``n`` modules of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from plora.kernels.dropout import combine, scaled_mask

ABSENT = -1


@dataclass(frozen=True)
class Tables:
    """What the products read about the adapters, on the host.

    Args:
        rows: int64 ``[K + 2]``, first row of each slot, then the first row that sees the base
            alone, then the number of rows.
        rank: int64 ``[K]``.
        scale: float64 ``[K]``.
        limit: int64 ``[K]``, dropout threshold; 0 is none.
        key: int64 ``[K]``, dropout key of the slot's seed and step.
    """

    rows: torch.Tensor
    rank: torch.Tensor
    scale: torch.Tensor
    limit: torch.Tensor
    key: torch.Tensor

    @classmethod
    def empty(cls, slots: int) -> Tables:
        """Tables of a pack without adapters."""
        counts = (torch.zeros(slots, dtype=torch.int64) for _ in range(3))
        rank, limit, key = counts
        return cls(
            rows=torch.zeros(slots + 2, dtype=torch.int64),
            rank=rank,
            scale=torch.zeros(slots, dtype=torch.float64),
            limit=limit,
            key=key,
        )

    def as_list(self) -> list[torch.Tensor]:
        """The form in which they cross the operator boundary."""
        return [self.rows, self.rank, self.scale, self.limit, self.key]


@dataclass(frozen=True)
class _Segment:
    """One adapter's rows in one of a group's modules, with its factors: A ``[r, D]``, B stored as ``[r, N]``."""

    member: int
    rows: slice
    columns: slice
    rank: int
    scale: float
    a: int
    b: int
    limit: int
    key: int

    def hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """Its part ``[t, r]`` of the hidden matrix."""
        return hidden[self.rows, self.columns]

    def factor(self, flat: torch.Tensor, begin: int, width: int) -> torch.Tensor:
        """View ``[r, width]`` of an arena."""
        return flat[begin : begin + self.rank * width].view(self.rank, width)

    def mask(self, token_index: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return scaled_mask(self.key, token_index[self.rows], width, self.limit, dtype)


def lora_down(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    tables: Tables,
    token_index: torch.Tensor,
    max_rank: int,
) -> torch.Tensor:
    """``hidden = dropout(x) A^T`` for each adapter's rows and each module of the group.

    Args:
        x: ``[T, D]``, the group's input. weight: flat arena in x's dtype.
        offsets: int64 ``[n, 2 K + 1]``: for each module where A and where B of each slot begin in the
            arena (``ABSENT`` where the adapter has none in this module), and the key of the input.
        token_index: int32 ``[T]``. max_rank: R.

    Returns:
        ``[T, n R]``, module ``m`` in columns ``m R`` and on.
    """
    width = x.shape[1]
    hidden = x.new_zeros(x.shape[0], len(offsets) * max_rank)
    for segment in _segments(offsets, tables, max_rank):
        inputs = x[segment.rows]
        if segment.limit:
            inputs = inputs * segment.mask(token_index, width, x.dtype)
        segment.hidden(hidden).copy_(inputs @ segment.factor(weight, segment.a, width).T)
    return hidden


def lora_down_grad_factor(
    dhidden: torch.Tensor,
    x: torch.Tensor,
    grad: torch.Tensor,
    offsets: torch.Tensor,
    tables: Tables,
    token_index: torch.Tensor,
) -> None:
    """``dA += dhidden^T dropout(x)`` into ``grad``, flat, fp32 and parallel to the arena's weights."""
    width = x.shape[1]
    for segment in _segments(offsets, tables, dhidden.shape[1] // len(offsets)):
        inputs = x[segment.rows]
        if segment.limit:
            inputs = inputs * segment.mask(token_index, width, x.dtype)
        _add_product(segment.factor(grad, segment.a, width), segment.hidden(dhidden), inputs, 1.0)


def lora_down_grad_input(
    dhidden: torch.Tensor,
    width: int,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    tables: Tables,
    token_index: torch.Tensor,
) -> torch.Tensor:
    """``dx = mask * (dhidden A)``, summed over the group, ``[T, width]``."""
    dx = dhidden.new_zeros(dhidden.shape[0], width)
    for segment in _segments(offsets, tables, dhidden.shape[1] // len(offsets)):
        part = segment.hidden(dhidden) @ segment.factor(weight, segment.a, width)
        dx[segment.rows] += part * segment.mask(token_index, width, dx.dtype) if segment.limit else part
    return dx


def lora_up(
    ys: Sequence[torch.Tensor], hidden: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, tables: Tables
) -> list[torch.Tensor]:
    """``out = y + scale * hidden B^T`` for each module's ``y [T, N]``; N differs among them."""
    outs = [y.clone() for y in ys]
    for segment in _segments(offsets, tables, hidden.shape[1] // len(offsets)):
        out = outs[segment.member]
        factor = segment.factor(weight, segment.b, out.shape[1])
        out[segment.rows].addmm_(segment.hidden(hidden), factor, alpha=segment.scale)
    return outs


def lora_up_backward(
    dys: Sequence[torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    offsets: torch.Tensor,
    tables: Tables,
) -> torch.Tensor:
    """Adds dB to ``grad`` and returns dhidden ``[T, n R]``."""
    dhidden = torch.zeros_like(hidden)
    for segment in _segments(offsets, tables, hidden.shape[1] // len(offsets)):
        dy = dys[segment.member]
        dout, width = dy[segment.rows], dy.shape[1]
        segment.hidden(dhidden).copy_((dout @ segment.factor(weight, segment.b, width).T) * segment.scale)
        _add_product(segment.factor(grad, segment.b, width), segment.hidden(hidden), dout, segment.scale)
    return dhidden


def check_rows(x: torch.Tensor, tables: Tables) -> None:
    """Refuse an input that is not of the routed rows, in any backend."""
    rows = int(tables.rows[-1])
    if rows != x.shape[0]:
        raise RuntimeError(
            f"a packed layer got {x.shape[0]} rows but route() was given {rows} in all: "
            "tokens_per_adapter plus base_tokens must add up to the rows of the flattened input"
        )


def _add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """``into += scale * left^T right``, accumulated in fp32."""
    if left.dtype == into.dtype:
        into.addmm_(left.T, right, alpha=scale)
    elif left.is_cuda:
        into.add_(torch.mm(left.T, right, out_dtype=into.dtype), alpha=scale)
    else:
        into.addmm_(left.T.to(into.dtype), right.to(into.dtype), alpha=scale)


def _segments(offsets: torch.Tensor, tables: Tables, max_rank: int) -> Iterator[_Segment]:
    starts, slots = tables.rows.tolist(), len(tables.rank)
    ranks, scales, limits, keys = (t.tolist() for t in (tables.rank, tables.scale, tables.limit, tables.key))
    members = offsets.tolist()
    for slot in range(slots):
        start, stop, rank = starts[slot], starts[slot + 1], ranks[slot]
        if start == stop:
            continue
        for member, places in enumerate(members):
            if places[slot] == ABSENT:
                continue
            yield _Segment(
                member=member,
                rows=slice(start, stop),
                columns=slice(member * max_rank, member * max_rank + rank),
                rank=rank,
                scale=scales[slot],
                a=places[slot],
                b=places[slots + slot],
                limit=limits[slot],
                key=combine(keys[slot], places[-1]) if limits[slot] else 0,
            )
