"""Published configurations of well-known base models, so that planning needs no download.

Figures from each checkpoint's public config.json; only the keys that shape the model.
"""

from __future__ import annotations

from typing import Any

from plora.models.spec import ModelError

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _qwen2_5(dim: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
    }


def _llama3(dim: int, ffn: int, layers: int, heads: int, factor: float, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": factor},
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
    }


SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}

_BASES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": _qwen2_5(896, 4864, 24, 14, 2, 151936, True),
    "Qwen/Qwen2.5-1.5B": _qwen2_5(1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2.5-3B": _qwen2_5(2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-7B": _qwen2_5(3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen2.5-14B": _qwen2_5(5120, 13824, 48, 40, 8, 152064, False),
    "Qwen/Qwen2.5-32B": _qwen2_5(5120, 27648, 64, 40, 8, 152064, False),
    "meta-llama/Llama-3.2-1B": _llama3(2048, 8192, 16, 32, 32.0, True),
    "meta-llama/Llama-3.2-3B": _llama3(3072, 8192, 28, 24, 32.0, True),
    "meta-llama/Llama-3.1-8B": _llama3(4096, 14336, 32, 32, 8.0, False),
}

# An instruction-tuned checkpoint has the shape of its base.
CONFIGS: dict[str, dict[str, Any]] = {
    **_BASES,
    **{f"{name}-Instruct": config for name, config in _BASES.items()},
    "HuggingFaceTB/SmolLM2-135M": SMOLLM2_135M,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2_135M,
}


def preset_config(name: str) -> dict[str, Any]:
    """A copy of the named preset's configuration.

    Raises:
        ModelError: if there is no such preset; the message lists those there are.
    """
    if name not in CONFIGS:
        raise ModelError(f"no preset is named {name!r}; there are {', '.join(sorted(CONFIGS))}")
    return dict(CONFIGS[name])
