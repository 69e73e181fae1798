"""The packed products that ride on SwiGLU, on the CUDA kernels of ``csrc/``; see ``swiglu`` for what they compute.

The fused kernels know no dropout, and add up in an order that changes; where either matters their parts are put
together from ``plora.kernels.cuda``.

Shapes as in ``cuda``: ``F`` features of the activation, ``hidden [T, 2 R]`` of gate and up, ``offsets [2, 2 K + 1]``
theirs, ``down_offsets [1, 2 K + 1]`` of the linear that reads the activation.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from plora.kernels import cuda
from plora.kernels.dispatch import kernels
from plora.kernels.schedule import Work


def lora_swiglu(
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
    weight: Tensor,
    work: Work,
    offsets: Tensor,
    down_offsets: Tensor,
    token_index: Tensor,
    max_rank: int,
    has_dropout: bool,
) -> tuple[Tensor, Tensor]:
    """``act [T, F]`` and what the next linear's adapters make of it ``[T, R]``; see ``swiglu.lora_swiglu``.

    ``has_dropout``: whether any adapter of the microbatch has.
    """
    act, hidden_down = torch.empty_like(gate), gate.new_empty(gate.shape[0], max_rank)
    swiglu(gate, up, hidden, weight, act, None if has_dropout else hidden_down, work, offsets, down_offsets)
    if has_dropout:
        cuda.down(act, weight, hidden_down, work, down_offsets, token_index)
    return act, hidden_down


def lora_swiglu_backward(
    dact: Tensor,
    dhidden_down: Tensor,
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
    weight: Tensor,
    grad: Tensor,
    work: Work,
    offsets: Tensor,
    down_offsets: Tensor,
    token_index: Tensor,
    has_dropout: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dgate``, ``dup``, ``dhidden``; adds the factors' gradients to ``grad``. See ``swiglu.lora_swiglu_backward``."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if not has_dropout and not torch.are_deterministic_algorithms_enabled():
        dhidden = torch.empty_like(hidden)
        swiglu_grad(
            dact, dhidden_down, gate, up, hidden, weight, grad, dgate, dup, dhidden, work, offsets, down_offsets,
            token_index,
        )  # fmt: skip
        return dgate, dup, dhidden
    act = torch.empty_like(gate)
    given: Tensor | None = dhidden_down
    if has_dropout:
        dact0, dact, given = dact, torch.empty_like(dact), None
        cuda.up([dact0], dhidden_down, weight, [dact], work, down_offsets, token_index, backward=True)
    swiglu_pointwise_grad(dact, given, gate, up, hidden, weight, dgate, dup, act, work, offsets, down_offsets)
    cuda.grad_factor(act, dhidden_down, grad, work, down_offsets, token_index)
    dhidden = cuda.lora_up_backward([dgate, dup], hidden, weight, grad, work, offsets, token_index)
    return dgate, dup, dhidden


def swiglu(
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
    weight: Tensor,
    act: Tensor,
    hidden_down: Tensor | None,
    work: Work,
    offsets: Tensor,
    down_offsets: Tensor,
    steps: int = 0,
) -> None:
    """``act`` and, if asked for, ``hidden_down = act A^T``, without dropout.

    ``steps``: of 64 columns that a block walks, here and below. Default: as suits the device.
    """
    _, count, blocks = work.tiles_of(1)
    kernels().swiglu(
        gate, up, hidden, weight, act, hidden_down, work.tiles, count, offsets, down_offsets, work.partials,
        work.counters, blocks, steps,
    )  # fmt: skip


def swiglu_pointwise_grad(
    dact: Tensor,
    dhidden_down: Tensor | None,
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
    weight: Tensor,
    dgate: Tensor,
    dup: Tensor,
    act: Tensor,
    work: Work,
    offsets: Tensor,
    down_offsets: Tensor,
    steps: int = 0,
) -> None:
    """``dgate``, ``dup`` and ``act``, where the gradient of act is ``dact`` and, if given, ``dhidden_down A``."""
    _, count, _ = work.tiles_of(1)
    kernels().swiglu_pointwise_grad(
        dact, dhidden_down, gate, up, hidden, weight, dgate, dup, act, work.tiles, count, offsets, down_offsets, steps
    )


def swiglu_grad(
    dact: Tensor,
    dhidden_down: Tensor,
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
    weight: Tensor,
    grad: Tensor,
    dgate: Tensor,
    dup: Tensor,
    dhidden: Tensor,
    work: Work,
    offsets: Tensor,
    down_offsets: Tensor,
    token_index: Tensor,
    steps: int = 0,
) -> None:
    """All of backward, without dropout: in one launch for adapters of few ranks, in three for the others."""
    wide, counts = _wide(work), work.counts
    act = None if wide is None else torch.empty_like(gate)
    kernels().swiglu_grad(
        dact, dhidden_down, gate, up, hidden, weight, grad, dgate, dup, act, dhidden, work.tiles, counts.tiles[0],
        work.walks, counts.walks, offsets, down_offsets, work.sums, work.counters, counts.other_blocks, steps,
    )  # fmt: skip
    if wide is not None and act is not None:
        cuda.grad_hidden_and_up([dgate, dup], hidden, weight, dhidden, grad, wide, offsets, token_index)
        cuda.grad_factor(act, dhidden_down, grad, wide, down_offsets, token_index)


def _wide(work: Work) -> Work | None:
    """The work of the adapters of too many ranks for ``swiglu_grad`` to see to, which its lists begin with."""
    counts = work.counts
    if not counts.wide_walks:
        return None
    only = counts._replace(runs=(counts.wide_runs, *counts.runs[1:]), walks=counts.wide_walks)
    return replace(work, numbers=torch.tensor(only.flat()))
