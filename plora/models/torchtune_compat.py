"""Llama 3 and Qwen2.5 built from torchtune's modules. The only file that imports torchtune.

torchtune 0.6.1 is its last release; whatever it cannot express exactly is left to transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from plora.tune_hook import restore_torchao_names

restore_torchao_names()

from torchtune.models.llama3_1 import Llama3ScaledRoPE, llama3_1  # noqa: E402
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings, qwen2  # noqa: E402
from torchtune.modules import (  # noqa: E402
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from typing_extensions import override  # noqa: E402

from plora.models.attention import PackedSequences, packed_attention  # noqa: E402
from plora.models.base import BaseModel, Sequences  # noqa: E402
from plora.models.spec import ModelError, ModelSpec, architecture, rope_settings, sliding_window  # noqa: E402
from plora.modules.linear import add, project  # noqa: E402

_LAYER_NAMES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "sa_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
_TOP_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_LAYER_PATH = re.compile(r"layers\.(\d+)\.(.+)")
# torchtune's norms call their parameter "scale".
_PARAMETER_NAMES = {"scale": "weight"}


def unsupported(config: Mapping[str, Any]) -> str | None:
    """Why torchtune cannot build this config exactly, None where it can."""
    family = architecture(config)
    if family not in ("LlamaForCausalLM", "Qwen2ForCausalLM"):
        return f"{family} is not in torchtune 0.6.1"
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    rope = rope_settings(config)
    allowed = ("default", "llama3") if family == "LlamaForCausalLM" else ("default",)
    reasons = {
        f"hidden_act {config.get('hidden_act')!r}": config.get("hidden_act", "silu") != "silu",
        "attention_bias": family == "LlamaForCausalLM" and bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "head_dim other than hidden_size / heads": dim % heads != 0
        or (config.get("head_dim") or dim // heads) != dim // heads,
        f"rope type {rope['rope_type']!r}": rope["rope_type"] not in allowed,
        "partial rotary": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (1, None),
        # Without layer_types a Qwen2 config says so by use_sliding_window; Llama has none.
        "sliding windows": family == "Qwen2ForCausalLM"
        and bool(config.get("use_sliding_window"))
        and sliding_window(config) is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class TorchtuneModel(BaseModel):
    """Llama 3 or Qwen2.5 on torchtune's modules; paths are torchtune's (``layers.0.attn.q_proj``)."""

    @property
    def decoder(self) -> TransformerDecoder:
        """The module, as torchtune's type."""
        assert isinstance(self.module, TransformerDecoder)
        return self.module

    @property
    @override
    def embedding(self) -> nn.Embedding:
        return self.decoder.tok_embeddings

    @property
    @override
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    @override
    def head_path(self) -> str | None:
        return "output" if isinstance(self.decoder.output, nn.Module) else None

    @override
    def run_layers(self, embedded: torch.Tensor, positions: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        hidden = embedded
        for layer in self.layers:
            hidden = layer(hidden, mask=sequences, input_pos=positions)
        return self.decoder.norm(hidden)

    @override
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.decoder.output(hidden)

    @override
    def hf_name(self, module_path: str) -> str:
        return hf_module_name(module_path)

    @override
    def export_rows(self, module_path: str) -> torch.Tensor | None:
        heads = {"q_proj": self.spec.num_heads, "k_proj": self.spec.num_kv_heads}.get(module_path.rsplit(".", 1)[-1])
        if heads is None or self.spec.architecture != "LlamaForCausalLM":
            return None
        return halves_from_pairs(heads, self.spec.head_dim)


def halves_from_pairs(heads: int, head_dim: int) -> torch.Tensor:
    """Row order ``p`` with ``W_hf = W_ours[p]`` for a rotary projection of Llama.

    torchtune turns neighbouring features (2i, 2i+1) of a head together, transformers turns (i, i + head_dim/2).
    """
    return torch.arange(heads * head_dim).view(heads, head_dim // 2, 2).transpose(1, 2).reshape(-1)


def hf_module_name(module_path: str) -> str:
    """A module's path here to its name in the Hugging Face model.

    Raises:
        ModelError: if there is no such module.
    """
    match = _LAYER_PATH.fullmatch(module_path)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}"
    if module_path in _TOP_NAMES:
        return _TOP_NAMES[module_path]
    raise ModelError(f"no module of this model is called {module_path!r}")


def hf_parameter_names(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs of (path here, name in a Hugging Face checkpoint) of all parameters."""
    for path, _ in module.named_parameters():
        owner, _, leaf = path.rpartition(".")
        yield path, f"{hf_module_name(owner)}.{_PARAMETER_NAMES.get(leaf, leaf)}"


class FusedRMSNorm(nn.Module):
    """Takes the place of torchtune's `RMSNorm`, under the same parameter name.

    torchtune's casts a bf16 input to fp32 first, which no fused kernel takes with a bf16 scale and which
    keeps an fp32 copy for backward. The kernel computes in fp32 anyway.
    """

    def __init__(self, original: RMSNorm) -> None:
        super().__init__()
        self.eps = original.eps
        self.scale = original.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` to ``[..., D]``."""
        if not torch.compiler.is_compiling():
            return F.rms_norm(x, self.scale.shape, self.scale, self.eps)
        # Written out, the compiler fuses it as well, and makes it again in backward where it would save
        # the fused operator's result.
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.scale).to(x.dtype)


class PackedSelfAttention(nn.Module):
    """Takes the place of torchtune's `MultiHeadAttention`, under the same child names.

    Attention runs on a packed run and never expands K and V to the query heads.
    """

    def __init__(self, original: MultiHeadAttention, rotary: nn.Module) -> None:
        super().__init__()
        self.head_dim = original.head_dim
        self.q_proj = original.q_proj
        self.k_proj = original.k_proj
        self.v_proj = original.v_proj
        self.output_proj = original.output_proj
        self.pos_embeddings = rotary

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, *, mask: Sequences, input_pos: torch.Tensor
    ) -> torch.Tensor:
        """``[1, T, D]`` to ``[1, T, D]``, the residual added; ``mask`` carries the sequences."""
        projected = project([self.q_proj, self.k_proj, self.v_proj], x)
        query, key, value = (each.unflatten(-1, (-1, self.head_dim)) for each in projected)
        query = self.pos_embeddings(query, input_pos=input_pos)[0]
        key, value = self.pos_embeddings(key, input_pos=input_pos)[0], value[0]
        if isinstance(mask, PackedSequences):
            out = packed_attention(query, key, value, mask.cu_seqlens, mask.max_len)
        else:
            out = mask.attend(self, query, key, value, None)
        return add(residual, self.output_proj, out.flatten(1)[None])


class PackedLayer(nn.Module):
    """Takes the place of torchtune's `TransformerSelfAttentionLayer`, under the same child names.

    What a block adds to the residual stream is added where the block's packed products end.
    """

    def __init__(self, original: TransformerSelfAttentionLayer, rotary: nn.Module) -> None:
        super().__init__()
        self.attn = PackedSelfAttention(original.attn, rotary)
        self.mlp = original.mlp
        self.sa_norm, self.mlp_norm = FusedRMSNorm(original.sa_norm), FusedRMSNorm(original.mlp_norm)

    def forward(self, x: torch.Tensor, *, mask: Sequences, input_pos: torch.Tensor) -> torch.Tensor:
        """``[1, T, D]`` to ``[1, T, D]``; ``mask`` carries the sequences."""
        hidden = self.attn(self.sa_norm(x), x, mask=mask, input_pos=input_pos)
        return add(hidden, self.mlp, self.mlp_norm(hidden))


def build(config: Mapping[str, Any], spec: ModelSpec, device: torch.device | str = "cpu") -> nn.Module:
    """The decoder with its parameters on the meta device and its rotary tables on ``device``."""
    sizes = {
        "vocab_size": spec.vocab_size,
        "num_layers": spec.num_layers,
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "embed_dim": spec.dim,
        "intermediate_dim": spec.ffn_dim,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        # The builder's own rotary table is replaced below.
        "max_seq_len": 1,
    }
    builder = qwen2 if spec.architecture == "Qwen2ForCausalLM" else llama3_1
    with torch.device("meta"):
        module = builder(**sizes)
    if spec.tied_embeddings:
        del module.output
        module.output = TiedLinear(module.tok_embeddings)
    module.max_seq_len = spec.max_positions
    rotary = _rotary(config, spec).to(device)
    module.layers = nn.ModuleList(PackedLayer(layer, rotary) for layer in module.layers)
    module.norm = FusedRMSNorm(module.norm)
    return module


def _rotary(config: Mapping[str, Any], spec: ModelSpec) -> nn.Module:
    """Rotary embeddings exactly as the config states them."""
    rope = rope_settings(config)
    sizes = {"dim": spec.head_dim, "max_seq_len": spec.max_positions, "base": rope["rope_theta"]}
    if spec.architecture == "Qwen2ForCausalLM":
        return Qwen2RotaryPositionalEmbeddings(**sizes)
    if rope["rope_type"] == "default":
        return RotaryPositionalEmbeddings(**sizes)
    return Llama3ScaledRoPE(
        **sizes,
        scale_factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        old_context_len=rope["original_max_position_embeddings"],
    )


def import_rows(path: str, spec: ModelSpec) -> torch.Tensor | None:
    """Row order ``p`` with ``W_ours = W_hf[p]`` of a parameter here, None where they agree."""
    leaf = path.split(".")[-2] if "." in path else ""
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(leaf)
    if heads is None or spec.architecture != "LlamaForCausalLM":
        return None
    return halves_from_pairs(heads, spec.head_dim).argsort()
