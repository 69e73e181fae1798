"""The kernels' interface in plain torch, piece by piece as they take their work: for machines without a GPU.

What is tested with it is everything around the kernels: work lists, offsets, column views, which kernel is called
with what. Parameters are named as in the bindings, and a test compares the two.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plora.kernels import schedule
from plora.kernels.dropout import combine, scaled_mask


@dataclass(frozen=True)
class Part:
    """What a piece has to do for one linear of its group."""

    rows: slice
    ranks: slice  # of the adapter
    columns: slice  # of the group's hidden matrix
    begin: int
    rank: int
    scale: float
    limit: int
    key: int
    replaces: bool

    def factor(self, flat: Tensor, width: int) -> Tensor:
        whole = flat[self.begin : self.begin + self.rank * width].view(self.rank, width)
        return whole[self.ranks]

    def take_grad(self, grad: Tensor, product: Tensor) -> None:
        """Add to the gradient of the factor's ranks, or replace it."""
        own = self.factor(grad, product.shape[1])
        own.copy_(product if self.replaces else own + product)

    def masked(self, x: Tensor, token_index: Tensor, input_key: int, use_dropout: bool) -> Tensor:
        if not use_dropout or not self.limit:
            return x
        key = combine(self.key, input_key)
        return x * scaled_mask(key, token_index[self.rows], x.shape[1], self.limit, x.dtype)


def records(pieces: Tensor, first: int, count: int) -> Iterator[Tensor]:
    """Those in use."""
    yield from (record for record in pieces[first : first + count] if record[2] > 0)


def rows_of(record: Tensor) -> slice:
    return slice(int(record[1]), int(record[1] + record[2]))


def parts(record: Tensor, offsets: Tensor, second: bool, stride: int) -> Iterator[Part]:
    """The linears that a piece works for; virtual ranks of several are whole chunks, one linear's after the other's."""
    offsets = offsets.reshape(-1, offsets.shape[-1])
    slots, members = offsets.shape[1] // 2, len(offsets)
    slot, rank = int(record[0]), int(record[5])
    if slot < 0:
        return
    begin, end = int(record[3]), int(record[3] + record[4])
    each = rank if members == 1 else -(-rank // schedule.CHUNK) * schedule.CHUNK
    for member in range(members):
        low, high = max(begin - member * each, 0), min(end - member * each, rank)
        place = int(offsets[member, slot + slots * second])
        if low >= high or place < 0:
            continue
        columns = slice(member * stride + low, member * stride + high)
        key = int(record[9:11].clone().view(torch.int64))
        scale = float(record[7:8].clone().view(torch.float32))
        replaces = bool(record[12])
        # More would not be one block's in `swiglu_grad`.
        assert not replaces or record[2] <= (128 if 16 < rank <= schedule.FUSED_RANKS else schedule.WALK_ROWS)
        yield Part(rows_of(record), slice(low, high), columns, place, rank, scale, int(record[8]), key, replaces)


def members_of(offsets: Tensor) -> int:
    return offsets.shape[0] if offsets.dim() == 2 else 1


def down(
    x, factors, hidden, pieces, first, count, most_share, offsets, second, token_index, partials, counters, blocks,
    use_dropout, use_scale, slots=0,
):  # fmt: skip
    stride, key = hidden.shape[1] // members_of(offsets), int(offsets.reshape(-1)[-1])
    for record in records(pieces, first, count):
        for part in parts(record, offsets, second, stride):
            inputs = part.masked(x[part.rows].float(), token_index, key, use_dropout)
            low = inputs @ part.factor(factors, x.shape[1]).float().T
            hidden[part.rows, part.columns] = (low * (part.scale if use_scale else 1)).to(hidden.dtype)


def up(
    ys, hidden, factors, outs, pieces, first, count, most_share, offsets, second, token_index, use_dropout, use_scale,
    slots=0, residual=None,
):  # fmt: skip
    each = offsets if len(outs) > 1 else [offsets]
    for y, low, out, own in zip(ys, hidden.chunk(len(outs), 1), outs, each, strict=True):
        stride, key = low.shape[1] // members_of(own), int(own.reshape(-1)[-1])
        total = sum((given.float() for given in (y, residual) if given is not None), torch.zeros(out.shape))
        for record in records(pieces, first, count):
            for part in parts(record, own, second, stride):
                wide = low[part.rows, part.columns].float() @ part.factor(factors, out.shape[1]).float()
                wide = part.masked(wide, token_index, key, use_dropout)
                total[part.rows] += wide * (part.scale if use_scale else 1)
        out.copy_(total)


def grad_factor(
    x, hidden, grad, pieces, first, count, offsets, second, token_index, use_dropout, use_scale
):  # fmt: skip
    stride, key = hidden.shape[1] // members_of(offsets), int(offsets.reshape(-1)[-1])
    for record in records(pieces, first, count):
        for part in parts(record, offsets, second, stride):
            inputs = part.masked(x[part.rows].float(), token_index, key, use_dropout)
            product = hidden[part.rows, part.columns].float().T @ inputs
            part.take_grad(grad, product * (part.scale if use_scale else 1))


def grad_hidden(
    dys, hidden, factors, grad_hidden, grad, pieces, count, offsets, token_index, sums, counters, blocks, clusters,
    clusters_per_run=0,
):  # fmt: skip
    n = len(dys)
    assert n == members_of(offsets)
    members = zip(dys, hidden.chunk(n, 1), grad_hidden.chunk(n, 1), offsets.reshape(n, -1), strict=True)
    for dy, low, dlow, own in members:
        for record in records(pieces, 0, count):
            for part in parts(record, own, True, low.shape[1]):
                dout = dy[part.rows].float()
                made = dout @ part.factor(factors, dy.shape[1]).float().T * part.scale
                dlow[part.rows, part.columns] = made.to(dlow.dtype)
                part.take_grad(grad, low[part.rows, part.columns].float().T @ dout * part.scale)


def _added(base, hidden, factors, record, offsets, second, columns, use_scale):
    """``base + scale hidden F`` of a tile's rows, with the whole rank."""
    rows = rows_of(record)
    total = base[rows].float()
    whole = record.clone()
    whole[3], whole[4] = 0, whole[5]
    for part in parts(whole, offsets, second, 0):
        low = hidden[rows, columns : columns + part.rank].float()
        total += low @ part.factor(factors, base.shape[1]).float() * (part.scale if use_scale else 1)
    return total


def _activations(dact, dhidden_down, gate, up, hidden, factors, record, offsets, down_offsets):
    """dgate, dup and act of a tile's rows."""
    half = hidden.shape[1] // 2
    g = _added(gate, hidden, factors, record, offsets[0], True, 0, True)
    u = _added(up, hidden, factors, record, offsets[1], True, half, True)
    d = dact[rows_of(record)].float()
    if dhidden_down is not None:
        d = _added(dact, dhidden_down, factors, record, down_offsets[0], False, 0, False)
    sigmoid, silu = torch.sigmoid(g), F.silu(g)
    return d * u * sigmoid * (1 + g - silu), d * silu, silu * u


def swiglu(
    gate, up, hidden, factors, act, hidden_down, tiles, count, offsets, down_offsets, partials, counters, blocks,
    steps=0,
):  # fmt: skip
    half = hidden.shape[1] // 2
    for record in records(tiles, 0, count):
        rows = rows_of(record)
        g = _added(gate, hidden, factors, record, offsets[0], True, 0, True)
        u = _added(up, hidden, factors, record, offsets[1], True, half, True)
        act[rows] = (F.silu(g) * u).to(act.dtype)
    if hidden_down is not None:
        index = torch.zeros(len(act), dtype=torch.int32)
        down(act, factors, hidden_down, tiles, 0, count, 0, down_offsets, False, index, 0, 0, 0, False, False)


def swiglu_pointwise_grad(
    dact, dhidden_down, gate, up, hidden, factors, dgate, dup, act, tiles, tile_count, offsets, down_offsets, steps=0
):  # fmt: skip
    for record in records(tiles, 0, tile_count):
        made = _activations(dact, dhidden_down, gate, up, hidden, factors, record, offsets, down_offsets)
        for out, value in zip((dgate, dup, act), made, strict=True):
            out[rows_of(record)] = value.to(out.dtype)


def swiglu_grad(
    dact, dhidden_down, gate, up, hidden, factors, grad, dgate, dup, act, dhidden, tiles, tile_count, walks,
    walk_count, offsets, down_offsets, sums, counters, blocks, steps=0,
):  # fmt: skip
    for record in records(tiles, 0, tile_count):
        if record[5] <= schedule.FUSED_RANKS and record[0] >= 0:
            continue
        made = _activations(dact, dhidden_down, gate, up, hidden, factors, record, offsets, down_offsets)
        for out, value in zip((dgate, dup, act), made, strict=True):
            if out is not None:
                out[rows_of(record)] = value.to(out.dtype)
    for record in records(walks, 0, walk_count):
        if record[5] > schedule.FUSED_RANKS:
            continue
        rows = rows_of(record)
        made = _activations(dact, dhidden_down, gate, up, hidden, factors, record, offsets, down_offsets)
        dgate[rows], dup[rows] = (value.to(dgate.dtype) for value in made[:2])
        grad_hidden(
            [dgate, dup], hidden, factors, dhidden, grad, record[None], 1, offsets, None, sums, counters, blocks, True
        )  # fmt: skip
        whole = torch.zeros_like(gate)
        whole[rows] = made[2].to(whole.dtype)
        grad_factor(whole, dhidden_down, grad, record[None], 0, 1, down_offsets, False, None, False, False)


def module(clusters: bool) -> types.SimpleNamespace:
    """In place of the extension."""
    kernels = (down, up, grad_factor, grad_hidden, swiglu, swiglu_pointwise_grad, swiglu_grad)
    constants = {name: getattr(schedule, name) for name in vars(schedule) if name.isupper()}
    return types.SimpleNamespace(
        **constants, **{each.__name__: each for each in kernels}, has_clusters=lambda: clusters
    )  # fmt: skip
