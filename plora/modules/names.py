"""Names of layers that adapters can go on, known before any model is looked at."""

from __future__ import annotations

import difflib

# Linear layers of transformers' causal language models, by the last component of their names.
KNOWN_LINEARS = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj"),
        *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2", "fc_in", "fc_out", "out_proj"),
        *("c_attn", "c_proj", "c_fc", "c_q", "c_k", "c_v", "Wqkv", "wqkv", "Wo", "wo", "Wi", "W_pack", "in_proj"),
        *("x_proj", "dt_proj", "attn_qkv", "attn_out", "ff_proj", "ff_out", "q_a_proj", "q_b_proj", "kv_b_proj"),
        *("kv_a_proj_with_mqa", "linear_qkv", "linear_proj", "query", "key", "value"),
    }
)
TORCHTUNE = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
HEADS = frozenset({"lm_head", "output", "embed_out", "head"})
_EMBEDDINGS = frozenset({"embed_tokens", "tok_embeddings", "wte", "wpe", "embed_in", "embeddings"})
_FROZEN_REASON = (
    "all adapters of a pack share it, so it stays frozen, and an adapter on it would not load in every server; "
    "leave it out"
)


def problem_with(name: str, linears: frozenset[str] = KNOWN_LINEARS) -> str | None:
    """What is wrong with ``name`` as a target module, or None.

    Args:
        name: the last component of a layer's name.
        linears: the names that are right: a model's own once it is known.
    """
    if name in HEADS:
        return f"{name!r} is the output head: {_FROZEN_REASON}"
    if name in _EMBEDDINGS:
        return f"{name!r} is an embedding: {_FROZEN_REASON}"
    if name in linears:
        return None
    if name in TORCHTUNE:
        return f"{name!r} is torchtune's name: write Hugging Face's, {TORCHTUNE[name]!r}"
    close = difflib.get_close_matches(name, sorted(linears), n=1)
    if close:
        return f"there is no linear layer named {name!r}; did you mean {close[0]!r}?"
    usual = sorted(linears) if linears is not KNOWN_LINEARS else ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
    return f"there is no linear layer named {name!r}; there are {', '.join(usual)}" + (
        ", up_proj, down_proj and others, or use all-linear" if linears is KNOWN_LINEARS else ""
    )
