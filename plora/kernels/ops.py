"""The packed products as torch operators, so that autograd and torch.compile see one opaque call.

A layer's product is cut at its narrow middle, ``lora_down`` and ``lora_up``, so that each half can be
shared (one ``lora_down`` for the linears that read the same input) or ride on a pass that happens anyway
(``lora_swiglu``: what is added to gate and up, and the next linear's ``lora_down``).

Backward writes the adapters' gradients straight into the arena and returns dx. It has to run even
where nothing asks for dx (the first layer over a frozen embedding), so ``lora_down`` also takes a
one-element ``anchor`` that requires a gradient; its gradient, a zero, is an output of the backward
operator, which therefore can be neither skipped by autograd nor removed by the compiler. The others
depend on ``lora_down``'s result, and so do their backwards.

The gradients reach backward by handle, not as an argument: compiled graphs would save them with
their version, which the next layer's backward changes. The handle is a tensor, because a number would be a
part of the compiled graph, which then could not be found again on disk by the next pack.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from plora.kernels import cuda, cuda_swiglu, grouped, reference, swiglu
from plora.kernels.dispatch import backend
from plora.kernels.reference import Tables


class GradientBuffer:
    """Where backward accumulates: a flat fp32 tensor, found by its ``handle``, int64 ``[1]`` on the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._number = next(_HANDLES)
        self.handle = torch.tensor([self._number], device="cpu")
        _BUFFERS[self._number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientBuffer:
        return GradientBuffer(copy.deepcopy(self.tensor, memo))


def tag_compiled_graphs(file: str) -> None:
    """Keep compiled graphs on disk apart by the content of ``file``, of which torch knows nothing.

    It knows an operator by its name alone: graphs of another version, whose operators or their backwards may differ,
    must not be taken for this one's.
    """
    torch.compiler.config.cache_key_tag += f"plora-{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}"


tag_compiled_graphs(__file__)

_HANDLES = itertools.count()
_BUFFERS: WeakValueDictionary[int, GradientBuffer] = WeakValueDictionary()


def _gradients(handle: Tensor) -> Tensor:
    return _BUFFERS[int(handle)].tensor


_NO_ROUTE = (
    "a packed layer was called outside of `with packed.route(tokens_per_adapter):`, "
    "so it cannot know which rows belong to which adapter; under activation checkpointing "
    "backward belongs inside too, since it runs the layers again"
)


@torch.library.custom_op("plora::lora_down", mutates_args=())
def lora_down(
    x: Tensor,
    anchor: Tensor,
    weight: Tensor,
    gradients: Tensor,
    routed: Tensor,
    offsets: Tensor,
    tables: list[Tensor],
    device: list[Tensor],
    token_index: Tensor,
    max_rank: int,
) -> Tensor:
    """See ``reference.lora_down``; ``anchor`` and ``gradients`` are for backward.

    Args:
        anchor: fp32 ``[1]``, requires a gradient. gradients: handle of the ``GradientBuffer``.
        routed: bool ``[1]`` on the host, whether a route is active.
        device: what the CUDA kernels read in place of the tables, and the offsets on the device; empty
            where the reference is to run.
    """
    if not routed:
        raise RuntimeError(_NO_ROUTE)
    host = Tables(*tables)
    reference.check_rows(x, host)
    if device:
        return cuda.lora_down(x, weight, cuda.Work(*device[:-1]), device[-1], token_index, max_rank)
    return _products(x).lora_down(x, weight, offsets, host, token_index, max_rank)


@lora_down.register_fake
def _(x, anchor, weight, gradients, routed, offsets, tables, device, token_index, max_rank):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], offsets.shape[0] * max_rank)


@torch.library.custom_op("plora::lora_down_grad_factor", mutates_args=())
def lora_down_grad_factor(
    dhidden: Tensor,
    x: Tensor,
    gradients: Tensor,
    offsets: Tensor,
    tables: list[Tensor],
    device: list[Tensor],
    token_index: Tensor,
) -> Tensor:
    """See ``reference.lora_down_grad_factor``; returns the anchor's gradient, a zero."""
    grad = _gradients(gradients)
    if device:
        cuda.grad_factor(x, dhidden, grad, cuda.Work(*device[:-1]), device[-1], token_index)
    else:
        _products(x).lora_down_grad_factor(dhidden, x, grad, offsets, Tables(*tables), token_index)
    return grad.new_zeros(1)


@lora_down_grad_factor.register_fake
def _(dhidden, x, gradients, offsets, tables, device, token_index):  # type: ignore[no-untyped-def]
    return x.new_empty(1, dtype=torch.float32)


@torch.library.custom_op("plora::lora_down_grad_input", mutates_args=())
def lora_down_grad_input(
    dhidden: Tensor,
    width: int,
    weight: Tensor,
    offsets: Tensor,
    tables: list[Tensor],
    device: list[Tensor],
    token_index: Tensor,
) -> Tensor:
    """See ``reference.lora_down_grad_input``.

    Does not read x, so that a compiled norm's backward, which waits for dx, can make x again in the same pass.
    """
    if device:
        return cuda.lora_down_grad_input(dhidden, width, weight, cuda.Work(*device[:-1]), device[-1], token_index)
    return _products(dhidden).lora_down_grad_input(dhidden, width, weight, offsets, Tables(*tables), token_index)


@lora_down_grad_input.register_fake
def _(dhidden, width, weight, offsets, tables, device, token_index):  # type: ignore[no-untyped-def]
    return dhidden.new_empty(dhidden.shape[0], width)


def _down_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, _, weight, gradients, _, offsets, tables, device, token_index, _ = inputs
    # Saving the tables lets autograd refuse a backward that comes after the next route(), which
    # has rewritten them.
    ctx.save_for_backward(x, weight, gradients, offsets, token_index, *tables, *device)
    ctx.n_tables = len(tables)


def _down_backward(ctx, dhidden):  # type: ignore[no-untyped-def]
    x, weight, gradients, offsets, token_index, *rest = ctx.saved_tensors
    tables, device = rest[: ctx.n_tables], rest[ctx.n_tables :]
    dhidden, dx = dhidden.contiguous(), None
    if ctx.needs_input_grad[0]:
        dx = lora_down_grad_input(dhidden, x.shape[1], weight, offsets, tables, device, token_index)
    danchor = lora_down_grad_factor(dhidden, x, gradients, offsets, tables, device, token_index)
    return dx, danchor, None, None, None, None, _none(tables), _none(device), None, None


lora_down.register_autograd(_down_backward, setup_context=_down_context)


@torch.library.custom_op("plora::lora_up", mutates_args=())
def lora_up(
    ys: list[Tensor],
    residual: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    gradients: Tensor,
    offsets: Tensor,
    tables: list[Tensor],
    device: list[Tensor],
    token_index: Tensor,
) -> list[Tensor]:
    """See ``reference.lora_up``; ``gradients`` is for backward.

    ``residual [T, N]``, what the model adds to the only one of ``ys`` next, rides along.
    """
    host = Tables(*tables)
    if residual is not None and len(ys) > 1:
        raise ValueError(f"residual is added to the output of one linear, got {len(ys)}")
    for y in ys:
        reference.check_rows(y, host)
    if device:
        return cuda.lora_up(ys, hidden, weight, cuda.Work(*device[:-1]), device[-1], token_index, residual)
    outs: list[Tensor] = _products(*ys).lora_up(ys, hidden, weight, offsets, host)
    return outs if residual is None else [outs[0] + residual]


@lora_up.register_fake
def _(ys, residual, hidden, weight, gradients, offsets, tables, device, token_index):  # type: ignore[no-untyped-def]
    return [torch.empty_like(y) for y in ys]


@torch.library.custom_op("plora::lora_up_backward", mutates_args=())
def lora_up_backward(
    dys: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
    gradients: Tensor,
    offsets: Tensor,
    tables: list[Tensor],
    device: list[Tensor],
    token_index: Tensor,
) -> Tensor:
    """See ``reference.lora_up_backward``."""
    grad = _gradients(gradients)
    if device:
        return cuda.lora_up_backward(dys, hidden, weight, grad, cuda.Work(*device[:-1]), device[-1], token_index)
    return _products(*dys).lora_up_backward(dys, hidden, weight, grad, offsets, Tables(*tables))


@lora_up_backward.register_fake
def _(dys, hidden, weight, gradients, offsets, tables, device, token_index):  # type: ignore[no-untyped-def]
    return torch.empty_like(hidden)


def _up_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, residual, hidden, weight, gradients, offsets, tables, device, token_index = inputs
    ctx.save_for_backward(hidden, weight, gradients, offsets, token_index, *tables, *device)
    ctx.n_tables = len(tables)
    ctx.shapes, ctx.has_residual = [out.shape for out in output], residual is not None


def _up_backward(ctx, dys):  # type: ignore[no-untyped-def]
    hidden, weight, gradients, offsets, token_index, *rest = ctx.saved_tensors
    tables, device = rest[: ctx.n_tables], rest[ctx.n_tables :]
    # An output that the loss does not depend on has no gradient.
    dys = [
        hidden.new_zeros(shape) if dy is None else dy.contiguous() for dy, shape in zip(dys, ctx.shapes, strict=True)
    ]
    dhidden = lora_up_backward(dys, hidden, weight, gradients, offsets, tables, device, token_index)
    dresidual = dys[0] if ctx.has_residual else None
    return dys, dresidual, dhidden, None, None, None, _none(tables), _none(device), None


lora_up.register_autograd(_up_backward, setup_context=_up_context)


@torch.library.custom_op("plora::lora_swiglu", mutates_args=())
def lora_swiglu(
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
    weight: Tensor,
    gradients: Tensor,
    offsets: Tensor,
    down_offsets: Tensor,
    tables: list[Tensor],
    device: list[Tensor],
    token_index: Tensor,
    max_rank: int,
) -> tuple[Tensor, Tensor]:
    """See ``swiglu.lora_swiglu``; the last two of ``device`` are both offsets on the device."""
    host = Tables(*tables)
    reference.check_rows(gate, host)
    if device:
        *tables_there, offsets, down_offsets = device
        return cuda_swiglu.lora_swiglu(
            gate, up, hidden, weight, cuda.Work(*tables_there), offsets, down_offsets, token_index, max_rank,
            has_dropout=bool(host.limit.any()),
        )  # fmt: skip
    return swiglu.lora_swiglu(
        _products(gate), gate, up, hidden, weight, offsets, down_offsets, host, token_index, max_rank
    )


@lora_swiglu.register_fake
def _(gate, up, hidden, weight, gradients, offsets, down_offsets, tables, device, token_index, max_rank):  # type: ignore[no-untyped-def]
    return torch.empty_like(gate), gate.new_empty(gate.shape[0], max_rank)


@torch.library.custom_op("plora::lora_swiglu_backward", mutates_args=())
def lora_swiglu_backward(
    dact: Tensor,
    dhidden_down: Tensor,
    gate: Tensor,
    up: Tensor,
    hidden: Tensor,
    weight: Tensor,
    gradients: Tensor,
    offsets: Tensor,
    down_offsets: Tensor,
    tables: list[Tensor],
    device: list[Tensor],
    token_index: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``swiglu.lora_swiglu_backward``."""
    grad, host = _gradients(gradients), Tables(*tables)
    if device:
        *tables_there, offsets, down_offsets = device
        return cuda_swiglu.lora_swiglu_backward(
            dact, dhidden_down, gate, up, hidden, weight, grad, cuda.Work(*tables_there), offsets, down_offsets,
            token_index, has_dropout=bool(host.limit.any()),
        )  # fmt: skip
    return swiglu.lora_swiglu_backward(
        _products(gate), dact, dhidden_down, gate, up, hidden, weight, grad, offsets, down_offsets, host, token_index
    )


@lora_swiglu_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dact, dhidden_down, gate, up, hidden, weight, gradients, offsets, down_offsets, tables, device, token_index
):
    return torch.empty_like(gate), torch.empty_like(up), torch.empty_like(hidden)


def _swiglu_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    gate, up, hidden, weight, gradients, offsets, down_offsets, tables, device, token_index, _ = inputs
    ctx.save_for_backward(gate, up, hidden, weight, gradients, offsets, down_offsets, token_index, *tables, *device)
    ctx.n_tables = len(tables)


def _swiglu_backward(ctx, dact, dhidden_down):  # type: ignore[no-untyped-def]
    gate, up, hidden, weight, gradients, offsets, down_offsets, token_index, *rest = ctx.saved_tensors
    tables, device = rest[: ctx.n_tables], rest[ctx.n_tables :]
    dgate, dup, dhidden = lora_swiglu_backward(
        dact.contiguous(), dhidden_down.contiguous(), gate, up, hidden, weight, gradients, offsets, down_offsets,
        tables, device, token_index,
    )  # fmt: skip
    return dgate, dup, dhidden, None, None, None, None, _none(tables), _none(device), None, None


lora_swiglu.register_autograd(_swiglu_backward, setup_context=_swiglu_context)


def _products(*activations: Tensor) -> ModuleType:
    """What makes the products of these activations where our kernels do not."""
    return grouped if backend().name == "grouped" and grouped.serves(*activations) else reference


def _none(tensors: list[Tensor]) -> list[None]:
    return [None] * len(tensors)
