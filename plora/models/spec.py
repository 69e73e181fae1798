"""A model's shape, read from its config.json alone: no torch, no weights, no download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

# Families whose every parameter follows from the config; others are measured on a model without storage.
DENSE_FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

SHAPE_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)


class ModelError(ValueError):
    """A base model cannot be used as asked; the message says what was seen and what to do."""


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer of a decoder layer.

    Args:
        name: last component of its Hugging Face name, e.g. ``"q_proj"``.
        in_features: width of the input.
        out_features: width of the output.
        parallel: how tensor parallelism splits its weight: ``"column"`` by output, ``"row"`` by input.
        bias: whether the base layer has one.
    """

    name: str
    in_features: int
    out_features: int
    parallel: Literal["column", "row"] = "column"
    bias: bool = False

    @property
    def n_params(self) -> int:
        """Elements of weight and bias."""
        return self.in_features * self.out_features + self.out_features * self.bias


@dataclass(frozen=True)
class ModelSpec:
    """What planning needs to know of a base model.

    Args:
        name: short name, for reports.
        architecture: the class named in config.json, e.g. ``"Qwen2ForCausalLM"``.
        num_layers: decoder layers.
        dim: width of the residual stream.
        ffn_dim: width of the feed-forward layer.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: features of a head.
        vocab_size: rows of the embedding table.
        max_positions: longest sequence the checkpoint declares, in tokens.
        tied_embeddings: whether the output head is the embedding table.
        linears: the linear layers of one decoder layer; all layers are alike.
        n_params: parameters of the base, tied ones counted once.
        sliding_window: tokens that some layer's attention reaches back, None where all see everything.
        source: the folder or hub id it was read from.
        commit: the hub commit, None for a local folder.
    """

    name: str
    architecture: str
    num_layers: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    linears: tuple[LinearSpec, ...]
    n_params: int
    sliding_window: int | None = None
    source: str = ""
    commit: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "", commit: str | None = None) -> ModelSpec:
        """Reads the content of a Hugging Face config.json.

        Raises:
            ModelError: if the architecture is not one of `DENSE_FAMILIES`, or a needed key is missing.
        """
        family = architecture(config)
        if family not in DENSE_FAMILIES:
            raise ModelError(f"the parameters of a {family} cannot be derived from config.json alone")
        shape = shape_of(config)
        linears = _dense_linears(config, family, shape)
        norms = 2 * shape["dim"] + (2 * shape["head_dim"] if family == "Qwen3ForCausalLM" else 0)
        layer = sum(linear.n_params for linear in linears) + norms
        tables = shape["vocab_size"] * shape["dim"] * (1 if shape["tied_embeddings"] else 2)
        return cls(
            name=short_name(source) or family,
            architecture=family,
            linears=linears,
            n_params=shape["num_layers"] * layer + shape["dim"] + tables,
            sliding_window=sliding_window(config),
            source=source,
            commit=commit,
            **shape,
        )

    @property
    def longest_sequence(self) -> int:
        """Tokens that a sequence may have: the positions, or the window where attention has one."""
        return min(self.max_positions, self.sliding_window or self.max_positions)

    @classmethod
    def preset(cls, name: str) -> ModelSpec:
        """The spec of a well-known checkpoint by its hub id, without any download.

        Raises:
            ModelError: if the name is not one of `plora.models.presets.CONFIGS`.
        """
        from plora.models.presets import preset_config

        return replace(cls.from_config(preset_config(name), source=name), name=short_name(name))


def architecture(config: Mapping[str, Any]) -> str:
    """The model class that config.json names.

    Raises:
        ModelError: if it names none.
    """
    names = config.get("architectures") or []
    if not names:
        raise ModelError(
            f"config.json has no 'architectures' (model_type {config.get('model_type')!r}): "
            'add the model class, e.g. "architectures": ["LlamaForCausalLM"]'
        )
    return str(names[0])


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes every decoder config states, as keyword arguments of `ModelSpec`.

    Raises:
        ModelError: naming the key that is missing or is not a positive number.
    """
    dim, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    return {
        "num_layers": _size(config, "num_hidden_layers"),
        "dim": dim,
        "ffn_dim": _size(config, "intermediate_size", 4 * dim),
        "num_heads": heads,
        "num_kv_heads": _size(config, "num_key_value_heads", heads),
        "head_dim": _size(config, "head_dim", dim // heads),
        "vocab_size": _size(config, "vocab_size"),
        "max_positions": _size(config, "max_position_embeddings", 2048),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Tokens that the shortest-sighted attention layer reaches back, or None."""
    kinds = config.get("layer_types")
    windows = []
    if kinds is None:
        if config.get("use_sliding_window", True) and config.get("sliding_window"):
            windows.append(int(config["sliding_window"]))
    else:
        if "sliding_attention" in kinds and config.get("sliding_window"):
            windows.append(int(config["sliding_window"]))
        if "chunked_attention" in kinds and config.get("attention_chunk_size"):
            windows.append(int(config["attention_chunk_size"]))
    return min(windows, default=None)


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under one name each, whichever transformers version wrote the file.

    Version 5 writes ``rope_parameters``; before, ``rope_theta`` and ``rope_scaling`` (with ``type``
    for ``rope_type``).
    """
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    settings["rope_type"] = settings.get("rope_type") or settings.pop("type", None) or "default"
    settings.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return settings


def short_name(source: str) -> str:
    """``"Qwen/Qwen2.5-7B"`` or ``"/models/Qwen2.5-7B/"`` to ``"Qwen2.5-7B"``."""
    return source.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {key} must be a positive whole number, got {value!r}")
    return value


def _dense_linears(config: Mapping[str, Any], family: str, shape: Mapping[str, Any]) -> tuple[LinearSpec, ...]:
    dim, ffn, head_dim = shape["dim"], shape["ffn_dim"], shape["head_dim"]
    q_out, kv_out = shape["num_heads"] * head_dim, shape["num_kv_heads"] * head_dim
    qwen2 = family == "Qwen2ForCausalLM"
    qkv_bias = qwen2 or bool(config.get("attention_bias", False))
    out_bias = not qwen2 and bool(config.get("attention_bias", False))
    mlp_bias = family == "LlamaForCausalLM" and bool(config.get("mlp_bias", False))
    return (
        LinearSpec("q_proj", dim, q_out, "column", qkv_bias),
        LinearSpec("k_proj", dim, kv_out, "column", qkv_bias),
        LinearSpec("v_proj", dim, kv_out, "column", qkv_bias),
        LinearSpec("o_proj", q_out, dim, "row", out_bias),
        LinearSpec("gate_proj", dim, ffn, "column", mlp_bias),
        LinearSpec("up_proj", dim, ffn, "column", mlp_bias),
        LinearSpec("down_proj", ffn, dim, "row", mlp_bias),
    )
