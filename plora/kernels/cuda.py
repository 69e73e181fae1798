"""The packed LoRA products on the CUDA kernels of ``csrc/``; see ``reference`` for what they compute.

bf16 only, accumulated in fp32. A *group* is the n = 1 to 3 linears that share an input x: ``x`` is read, and its
gradient written, once for all of them.

Shapes as in ``reference``; R is a multiple of 16. ``hidden`` and ``dhidden`` of a group ``[T, n R]``, member m's in
the columns from m R on; where one linear is meant they may be such columns ``[T, R]`` of a group's. ``offsets``
int64 on the device, ``[n, 2 K + 1]`` of a group, ``[2 K + 1]`` of one linear.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plora.kernels.dispatch import kernels
from plora.kernels.schedule import Work as Work


def lora_down(x: Tensor, weight: Tensor, work: Work, offsets: Tensor, token_index: Tensor, max_rank: int) -> Tensor:
    """``H_m = dropout(x) A_m^T`` of a group, ``[T, n R]``; see ``reference.lora_down``."""
    hidden = x.new_empty(x.shape[0], offsets.shape[0] * max_rank)
    down(x, weight, hidden, work, offsets, token_index)
    return hidden


def lora_down_grad_input(
    dhidden: Tensor, width: int, weight: Tensor, work: Work, offsets: Tensor, token_index: Tensor
) -> Tensor:
    """``dx = mask * sum_m dH_m A_m``, ``[T, width]``."""
    dx = dhidden.new_empty(dhidden.shape[0], width)
    up([None], dhidden, weight, [dx], work, offsets, token_index, backward=True)
    return dx


def lora_up(
    ys: Sequence[Tensor],
    hidden: Tensor,
    weight: Tensor,
    work: Work,
    offsets: Tensor,
    token_index: Tensor,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """``out_m = y_m + scale H_m B_m`` of each member, plus the residual; see ``ops.lora_up``."""
    outs = [torch.empty_like(y) for y in ys]
    up(ys, hidden, weight, outs, work, offsets, token_index, residual=residual)
    return outs


def lora_up_backward(
    dys: Sequence[Tensor],
    hidden: Tensor,
    weight: Tensor,
    grad: Tensor,
    work: Work,
    offsets: Tensor,
    token_index: Tensor,
) -> Tensor:
    """``dB_m += scale H_m^T dy_m`` into ``grad``; returns ``dH_m = scale dy_m B_m^T`` of all members, ``[T, n R]``."""
    dhidden, columns = torch.empty_like(hidden), hidden.shape[1] // len(dys)
    if not torch.are_deterministic_algorithms_enabled():
        grad_hidden_and_up(dys, hidden, weight, dhidden, grad, work, offsets, token_index)
        return dhidden
    members = zip(dys, hidden.split(columns, 1), dhidden.split(columns, 1), offsets.unbind(), strict=True)
    for dy, own_hidden, own_dhidden, own_offsets in members:
        down(dy, weight, own_dhidden, work, own_offsets, token_index, backward=True)
        grad_factor(dy, own_hidden, grad, work, own_offsets, token_index, backward=True)
    return dhidden


def down(
    x: Tensor,
    weight: Tensor,
    hidden: Tensor,
    work: Work,
    offsets: Tensor,
    token_index: Tensor,
    backward: bool = False,
    slots: int = 0,
) -> None:
    """``hidden = dropout(x) A^T`` of a group, or in backward ``hidden = scale x B^T`` of one linear for x = dy.

    ``slots``: blocks that the columns of all tiles are shared among. Default: as suits the device.
    """
    members = _members(offsets)
    first, count, blocks = work.tiles_of(members)
    kernels().down(
        x, weight, hidden, work.tiles, first, count, work.most_share_of(members), offsets, backward, token_index,
        work.partials, work.counters, blocks, not backward, backward, slots,
    )  # fmt: skip


def up(
    ys: Sequence[Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    outs: Sequence[Tensor],
    work: Work,
    offsets: Tensor,
    token_index: Tensor,
    backward: bool = False,
    slots: int = 0,
    residual: Tensor | None = None,
) -> None:
    """``out_m = y_m + scale hidden_m B_m^T`` of each member of a group.

    With ``backward`` a single ``y + mask * sum_m (hidden_m A_m)`` for hidden = dh.

    ``ys`` may be ``outs``; None is zero. ``residual``: added to the only one of ``outs`` too. ``slots`` as in
    ``down``, of each member.
    """
    members = _members(offsets) if backward else 1
    first, count, _ = work.tiles_of(members)
    kernels().up(
        ys, hidden, weight, outs, work.tiles, first, count, work.most_share_of(members), offsets, not backward,
        token_index, backward, not backward, slots, residual,
    )  # fmt: skip


def grad_hidden_and_up(
    dys: Sequence[Tensor],
    hidden: Tensor,
    weight: Tensor,
    dhidden: Tensor,
    grad: Tensor,
    work: Work,
    offsets: Tensor,
    token_index: Tensor,
    clusters: bool | None = None,
    clusters_per_run: int = 0,
) -> None:
    """``dhidden_m = scale dy_m B_m`` and ``dB_m += scale dy_m^T hidden_m`` of a group, in one pass over each dy.

    ``clusters``: the form for compute capability 9.0 and later, or the one for all. Default: what the device has.
    ``clusters_per_run``: how many of them share the columns of a member. Default: as many as fill the device, if their
    walks are long enough.
    """
    counts = work.counts
    clusters = kernels().has_clusters() if clusters is None else clusters
    pieces, count = (work.walks, counts.walks) if clusters else (work.runs, counts.runs[0])
    kernels().grad_hidden(
        dys, hidden, weight, dhidden, grad, pieces, count, offsets, token_index, work.sums, work.counters,
        counts.other_blocks, clusters, clusters_per_run,
    )  # fmt: skip


def grad_factor(
    x: Tensor,
    hidden: Tensor,
    grad: Tensor,
    work: Work,
    offsets: Tensor,
    token_index: Tensor,
    backward: bool = False,
) -> None:
    """``dA += hidden^T dropout(x)`` of a group for hidden = dh.

    With ``backward``, ``dB += scale hidden^T x`` of one linear for x = dy.
    """
    first, count = work.runs_of(_members(offsets))
    kernels().grad_factor(
        x, hidden, grad, work.runs, first, count, offsets, backward, token_index, not backward, backward
    )


def _members(offsets: Tensor) -> int:
    return offsets.shape[0] if offsets.dim() == 2 else 1
