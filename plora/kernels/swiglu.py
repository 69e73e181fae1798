"""The packed products around SwiGLU in plain torch: what the fused kernels are held to.

Shapes as in ``reference``, and ``F`` features between gate and down.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F

from plora.kernels.reference import Tables


def lora_swiglu(
    products: ModuleType,
    gate: torch.Tensor,
    up: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    down_offsets: torch.Tensor,
    tables: Tables,
    token_index: torch.Tensor,
    max_rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``act = silu(gate') * up'`` with gate' and up' by ``lora_up``, and the next linear's ``lora_down`` of it.

    Args:
        products: ``reference`` or ``grouped``, whose ``lora_up`` and ``lora_down`` it is made of.
        gate: ``[T, F]``, what the frozen linear gives. up: likewise.
        hidden: ``[T, 2 R]`` of the two. offsets: ``[2, 2 K + 1]``, theirs.
        down_offsets: ``[1, 2 K + 1]``, of the linear that reads ``act``.

    Returns:
        act ``[T, F]`` and its hidden ``[T, R]``.
    """
    gate, up = products.lora_up([gate, up], hidden, weight, offsets, tables)
    act = F.silu(gate) * up
    return act, products.lora_down(act, weight, down_offsets, tables, token_index, max_rank)


def lora_swiglu_backward(
    products: ModuleType,
    dact: torch.Tensor,
    dhidden_down: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    grad: torch.Tensor,
    offsets: torch.Tensor,
    down_offsets: torch.Tensor,
    tables: Tables,
    token_index: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adds dB of gate and up and dA of the next linear to ``grad``; gate', up' and act are computed again.

    Returns:
        dgate and dup ``[T, F]``, dhidden ``[T, 2 R]``.
    """
    gate, up = products.lora_up([gate, up], hidden, weight, offsets, tables)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    products.lora_down_grad_factor(dhidden_down, silu * up, grad, down_offsets, tables, token_index)
    dact = dact + products.lora_down_grad_input(dhidden_down, dact.shape[1], weight, down_offsets, tables, token_index)
    dgate, dup = dact * up * sigmoid * (1 + gate - silu), dact * silu
    return dgate, dup, products.lora_up_backward([dgate, dup], hidden, weight, grad, offsets, tables)
