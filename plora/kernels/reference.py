"""The packed LoRA products in plain torch: the definition that every other backend is held to.

A run of rows of ``x`` belongs to each adapter. The loop is over adapters and touches only the
small factors: no product per adapter is ever as wide as the base's.

Shapes: ``T`` packed tokens, ``D`` in-features, ``N`` out-features, ``R`` the widest rank of the
pack, ``r`` an adapter's rank, ``t`` its tokens, ``K`` slots.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """One adapter's rows in one module, with its factors: A ``[r, D]``, B stored as ``[r, N]``."""

    rows: slice
    rank: int
    scale: float
    a: slice
    b: slice
    limit: int
    key: int

    def mask(self, token_index: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        return scaled_mask(self.key, token_index[self.rows], width, self.limit, dtype)


def lora_add(
    x: torch.Tensor,
    y: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    tables: Tables,
    token_index: torch.Tensor,
    max_rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out = y + scale * dropout(x) A^T B^T`` for each adapter's rows.

    Args:
        x: ``[T, D]``. y: ``[T, N]``. weight: flat arena in x's dtype.
        offsets: int64 ``[2 K + 1]``: where A and where B of each slot begin in the arena
            (``ABSENT`` where the adapter has none in this module), and the key of the input.
        token_index: int32 ``[T]``. max_rank: R.

    Returns:
        out ``[T, N]`` and hidden ``[T, R]`` = dropout(x) A^T, kept for backward.
    """
    out = y.clone()
    hidden = x.new_zeros(x.shape[0], max_rank)
    for segment in _segments(x, y.shape[1], offsets, tables):
        rows = segment.rows
        inputs = x[rows]
        if segment.limit:
            inputs = inputs * segment.mask(token_index, x.shape[1], x.dtype)
        low = inputs @ weight[segment.a].view(segment.rank, -1).T
        hidden[rows, : segment.rank] = low
        out[rows].addmm_(low, weight[segment.b].view(segment.rank, -1), alpha=segment.scale)
    return out, hidden


def lora_add_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    offsets: torch.Tensor,
    tables: Tables,
    token_index: torch.Tensor,
    need_dx: bool,
) -> torch.Tensor:
    """Adds dA and dB to ``grad`` (flat, fp32, parallel to ``weight``) and returns dx ``[T, D]``.

    dx is the adapters' part alone; it is empty where ``need_dx`` is false.
    """
    dx = torch.zeros_like(x) if need_dx else x.new_empty(0)
    for segment in _segments(x, dy.shape[1], offsets, tables):
        rows, rank = segment.rows, segment.rank
        low, dout = hidden[rows, :rank], dy[rows]
        dlow = (dout @ weight[segment.b].view(rank, -1).T) * segment.scale
        inputs = x[rows]
        mask = segment.mask(token_index, x.shape[1], x.dtype) if segment.limit else None
        if mask is not None:
            inputs = inputs * mask
        _add_product(grad[segment.b].view(rank, -1), low, dout, segment.scale)
        _add_product(grad[segment.a].view(rank, -1), dlow, inputs, 1.0)
        if need_dx:
            into = dx[rows]
            torch.mm(dlow, weight[segment.a].view(rank, -1), out=into)
            if mask is not None:
                into.mul_(mask)
    return dx


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


def _segments(x: torch.Tensor, n: int, offsets: torch.Tensor, tables: Tables) -> Iterator[_Segment]:
    starts, slots = tables.rows.tolist(), len(tables.rank)
    *places, input_key = offsets.tolist()
    ranks, scales, limits, keys = (t.tolist() for t in (tables.rank, tables.scale, tables.limit, tables.key))
    width = x.shape[1]
    for slot in range(slots):
        start, stop, a, b = starts[slot], starts[slot + 1], places[slot], places[slots + slot]
        if start == stop or a == ABSENT:
            continue
        rank = ranks[slot]
        yield _Segment(
            rows=slice(start, stop),
            rank=rank,
            scale=scales[slot],
            a=slice(a, a + rank * width),
            b=slice(b, b + rank * n),
            limit=limits[slot],
            key=combine(keys[slot], input_key) if limits[slot] else 0,
        )
