"""Adapters over a base in NF4 compute what they compute over the base's rounded weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plora import AdapterConfig, pack_adapters
from plora.models import from_config
from plora.models.attention import PackedSequences
from plora.models.base import BaseModel
from plora.models.presets import SMOLLM2_135M
from tests.modules.toy import randomise

SMALL = {**SMOLLM2_135M, "num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 128, "intermediate_size": 192,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
LENGTHS = [5, 3, 7]


def rounded(base: BaseModel) -> BaseModel:
    """The same model in full precision with the weights that NF4 keeps."""
    wide = from_config(SMALL)
    for path, module in base.module.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "get_original_weight"):
            wide.module.get_submodule(path).weight.data.copy_(module.weight.get_original_weight())
    return wide


def step(base: BaseModel, compiled: bool) -> list[torch.Tensor]:
    packed = pack_adapters(base.module, [AdapterConfig(rank=4), AdapterConfig(rank=9, seed=1, dropout=0.2)])
    randomise(packed)
    if compiled:
        base.compile_layers(fullgraph=True, backend="aot_eager")
    sequences = PackedSequences.from_lengths(LENGTHS, base.device)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    with packed.route([8, 7], steps={0: 1, 1: 1}, dropout=True):
        hidden = base.hidden_states(torch.arange(15) * 3 % 64, positions, sequences)
        hidden.sin().sum().backward()
    return [hidden.detach(), packed.arena.grad]


@pytest.mark.parametrize("compiled", [False, True])
def test_equals_its_rounded_weights(compiled: bool) -> None:
    base = from_config(SMALL, quantize="nf4")
    expected = step(rounded(base), compiled=False)
    for ours, theirs in zip(step(base, compiled), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_compiled_layers_do_not_keep_dequantized_weights() -> None:
    base = from_config(SMALL, quantize="nf4", dtype="bf16")
    packed = pack_adapters(base.module, [AdapterConfig(rank=4)])
    base.compile_layers(backend="aot_eager_decomp_partition")
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    sequences, positions = PackedSequences.from_lengths([15]), torch.arange(15)
    with packed.route([15]), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        base.hidden_states(positions, positions, sequences)
    quantized = [tensor for tensor in kept if tensor.dtype == torch.uint8]
    smallest = min(tensor.numel() for tensor in quantized)
    # A quantized element holds two weights.
    wide = [tensor for tensor in kept if tensor.is_floating_point() and tensor.numel() >= 2 * smallest]
    assert len(quantized) >= 7
    assert not [tensor.shape for tensor in wide if 15 not in tensor.shape and tensor.dim() == 2]
