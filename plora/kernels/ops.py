"""The packed products as torch operators, so that autograd and torch.compile see one opaque call.

Backward writes the adapters' gradients straight into the arena and returns dx. It has to run even
where nothing asks for dx (the first layer over a frozen embedding), so each call also takes a
one-element ``anchor`` that requires a gradient; its gradient, a zero, is an output of the backward
operator, which therefore can be neither skipped by autograd nor removed by the compiler.

The gradients reach backward by handle, not as an argument: compiled graphs would save them with
their version, which the next layer's backward changes.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from plora.kernels import cuda, reference
from plora.kernels.reference import Tables


class GradientBuffer:
    """Where backward accumulates: a flat fp32 tensor, found by its ``handle``."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.handle = next(_HANDLES)
        _BUFFERS[self.handle] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientBuffer:
        return GradientBuffer(copy.deepcopy(self.tensor, memo))


_HANDLES = itertools.count()
_BUFFERS: WeakValueDictionary[int, GradientBuffer] = WeakValueDictionary()


@torch.library.custom_op("plora::lora_add", mutates_args=())
def lora_add(
    x: Tensor,
    y: Tensor,
    anchor: Tensor,
    weight: Tensor,
    gradients: int,
    routed: Tensor,
    offsets: Tensor,
    tables: list[Tensor],
    device: list[Tensor],
    token_index: Tensor,
    max_rank: int,
) -> tuple[Tensor, Tensor]:
    """See ``reference.lora_add``; ``anchor`` and ``gradients`` are for backward.

    Args:
        anchor: fp32 ``[1]``, requires a gradient. gradients: handle of the ``GradientBuffer``.
        routed: bool ``[1]`` on the host, whether a route is active.
        device: what the CUDA kernels read in place of the tables, see ``cuda.lora_add``; empty where
            the reference is to run.
    """
    if not routed:
        raise RuntimeError(
            "a packed layer was called outside of `with packed.route(tokens_per_adapter):`, "
            "so it cannot know which rows belong to which adapter; under activation checkpointing "
            "backward belongs inside too, since it runs the layers again"
        )
    host = Tables(*tables)
    reference.check_rows(x, host)
    if device:
        return cuda.lora_add(x, y, weight, device, token_index, max_rank)
    return reference.lora_add(x, y, weight, offsets, host, token_index, max_rank)


@lora_add.register_fake
def _(x, y, anchor, weight, gradients, routed, offsets, tables, device, token_index, max_rank):  # type: ignore[no-untyped-def]
    return torch.empty_like(y), x.new_empty(x.shape[0], max_rank)


@torch.library.custom_op("plora::lora_add_backward", mutates_args=())
def lora_add_backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    gradients: int,
    offsets: Tensor,
    tables: list[Tensor],
    device: list[Tensor],
    token_index: Tensor,
    need_dx: bool,
) -> tuple[Tensor, Tensor]:
    """See ``reference.lora_add_backward``; also returns the anchor's gradient, a zero."""
    grad = _BUFFERS[gradients].tensor
    if device:
        dx = cuda.lora_add_backward(dy, x, hidden, weight, grad, device, token_index, need_dx)
    else:
        dx = reference.lora_add_backward(dy, x, hidden, weight, grad, offsets, Tables(*tables), token_index, need_dx)
    return dx, grad.new_zeros(1)


@lora_add_backward.register_fake
def _(dy, x, hidden, weight, gradients, offsets, tables, device, token_index, need_dx):  # type: ignore[no-untyped-def]
    return torch.empty_like(x) if need_dx else x.new_empty(0), x.new_empty(1, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, _, _, weight, gradients, _, offsets, tables, device, token_index, _ = inputs
    # Saving the tables lets autograd refuse a backward that comes after the next route(), which
    # has rewritten them.
    ctx.save_for_backward(x, output[1], weight, offsets, token_index, *tables, *device)
    ctx.gradients, ctx.n_tables = gradients, len(tables)


def _backward(ctx, dy, _):  # type: ignore[no-untyped-def]
    x, hidden, weight, offsets, token_index, *rest = ctx.saved_tensors
    tables, device = rest[: ctx.n_tables], rest[ctx.n_tables :]
    need_dx = ctx.needs_input_grad[0]
    dx, danchor = lora_add_backward(
        dy.contiguous(), x, hidden, weight, ctx.gradients, offsets, tables, device, token_index, need_dx
    )
    no_tables, no_device = [None] * len(tables), [None] * len(device)
    return dx if need_dx else None, dy, danchor, None, None, None, None, no_tables, no_device, None, None


lora_add.register_autograd(_backward, setup_context=_setup_context)
