"""A base in 4 bits: torchao's NormalFloat4 (QLoRA, arXiv 2305.14314, section 3), as torchtune uses it."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from plora.models.spec import ModelError

_BLOCK = 64
_SCALER_BLOCK = 256


def to_nf4_parameter(weight: torch.Tensor) -> nn.Parameter:
    """The weight in NF4, frozen. `nn.Linear` multiplies with it in the dtype of its input.

    Blocks of 64 elements share a scale; groups of 256 scales, or the largest power of two that divides
    them, are quantized together.

    Raises:
        ModelError: if the weight does not fill whole blocks.
    """
    blocks, rest = divmod(weight.numel(), _BLOCK)
    if rest:
        raise ModelError(f"a weight of shape {tuple(weight.shape)} does not fill NF4's blocks of {_BLOCK}: use bf16")
    scaler_block = min(_SCALER_BLOCK, blocks & -blocks)
    with warnings.catch_warnings():
        # torchao announces a new home of the module; torchtune needs the old one.
        warnings.simplefilter("ignore")
        from torchao.dtypes.nf4tensor import to_nf4
    return nn.Parameter(to_nf4(weight, _BLOCK, scaler_block), requires_grad=False)


def is_nf4(weight: torch.Tensor) -> bool:
    """Whether a weight is kept in NF4."""
    return hasattr(weight, "quantized_scalers")
