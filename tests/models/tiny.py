"""Tiny random models, built by transformers: the independent truth of these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE),
    "llama_tied": LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, tie_word_embeddings=True
    ),
    "qwen2": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "qwen2_untied": Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16),
    "llama_bias": LlamaConfig(**_SIZES, attention_bias=True),
}
TORCHTUNE = ("llama", "llama_tied", "qwen2", "qwen2_untied")


def reference(config: Any, seed: int = 0) -> PreTrainedModel:
    """A model whose weights are large enough that attention is far from uniform, and biases from zero."""
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2 if parameter.dim() > 1 else 0.5, generator=generator)
    return model


def saved(name: str, folder: Path) -> Path:
    """Writes the named tiny model as a checkpoint."""
    reference(CONFIGS[name]).save_pretrained(folder)
    return folder
