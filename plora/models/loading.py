"""From a checkpoint or a configuration to a `BaseModel`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from plora.models import torchtune_compat
from plora.models.base import BaseModel
from plora.models.checkpoint import TensorInfo, read_index, read_tensors
from plora.models.hub import Checkpoint, resolve
from plora.models.presets import preset_config
from plora.models.quantize import to_nf4_parameter
from plora.models.spec import DENSE_FAMILIES, ModelError, ModelSpec, architecture, short_name

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Some checkpoints store what is computed here: rotary tables, and the head although it is tied.
_REDUNDANT = ("rotary_emb.inv_freq",)
_INIT_STD = 0.02


def inspect(source: str | Path, revision: str = "main") -> ModelSpec:
    """A checkpoint's shape from its config.json; no weights are downloaded or read.

    Raises:
        ModelError: if there is no such checkpoint or it cannot be a base.
    """
    return _spec(resolve(source, revision, weights=False))


def check(source: str | Path, revision: str = "main") -> ModelSpec:
    """`inspect`, and for weights that are on this machine also their files' headers against the config.

    Raises:
        ModelError: naming the file that is corrupt, or the tensor that does not fit with both shapes.
    """
    checkpoint = resolve(source, revision, weights=False)
    spec = _spec(checkpoint)
    if checkpoint.commit is None:
        tensors = read_index(checkpoint.folder)
        if torchtune_compat.unsupported(checkpoint.config) is None:
            _match(torchtune_compat.build(checkpoint.config, spec), spec, tensors, checkpoint.folder)
    return spec


def from_pretrained(
    source: str | Path,
    *,
    revision: str = "main",
    dtype: str = "fp32",
    quantize: Literal["nf4"] | None = None,
    device: torch.device | str = "cpu",
    activation_checkpointing: bool | int | Literal["auto"] = False,
) -> BaseModel:
    """Loads a frozen base model.

    Llama 3 and Qwen2.5 are built from torchtune's modules, every other causal model by transformers.

    Args:
        source: a folder, a hub id, or ``"smollm2-135m-instruct"``.
        revision: branch, tag or commit on the hub.
        dtype: ``"bf16"``, ``"fp32"``, or ``"nf4"`` for an NF4 base computing in bf16.
        quantize: ``"nf4"`` keeps the layers' linears in 4 bits; ``dtype`` is then that of activations.
        device: where to put it.
        activation_checkpointing: recompute each layer in backward, or this many; ``"auto"`` leaves it off here,
            for the caller to decide with `BaseModel.set_activation_checkpointing`.

    Raises:
        ModelError: if the checkpoint cannot be had, read, or represented exactly.
        ValueError: if more layers are to be recomputed than there are.
    """
    compute, quantize = _precision(dtype, quantize)
    checkpoint = resolve(source, revision)
    config, spec = checkpoint.config, _spec(checkpoint)
    reason = torchtune_compat.unsupported(config)
    base: BaseModel
    if reason is None:
        module = torchtune_compat.build(config, spec, device)
        tensors = _match(module, spec, read_index(checkpoint.folder), checkpoint.folder)
        _fill(module, spec, tensors, compute, quantize, device)
        base = torchtune_compat.TorchtuneModel(module, spec, config, checkpoint.folder)
    else:
        from plora.models import hf_compat

        logger.info("%s is built by transformers: %s", spec.name, reason)
        read_index(checkpoint.folder)
        base = hf_compat.load(checkpoint.folder, spec, config, compute, quantize, device)
    base.set_activation_checkpointing(False if activation_checkpointing == "auto" else activation_checkpointing)
    return base


def from_config(
    config: Mapping[str, Any] | str,
    *,
    dtype: str = "fp32",
    quantize: Literal["nf4"] | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> BaseModel:
    """A base model with random weights, for benchmarks and tests.

    Args:
        config: the content of a config.json, or the hub id of a preset.
        dtype: as in `from_pretrained`.
        quantize: as in `from_pretrained`.
        device: where to put it.
        seed: seeds the weights.

    Raises:
        ModelError: if the config is no preset and not a supported architecture.
    """
    compute, quantize = _precision(dtype, quantize)
    source = config if isinstance(config, str) else ""
    content = preset_config(config) if isinstance(config, str) else dict(config)
    if torchtune_compat.unsupported(content) is not None:
        from plora.models import hf_compat

        return hf_compat.random(content, compute, quantize, device, seed)
    spec = ModelSpec.from_config(content, source=source)
    module = torchtune_compat.build(content, spec, device)
    generator = torch.Generator(device).manual_seed(seed)
    for path, parameter in list(module.named_parameters()):
        value = torch.empty(parameter.shape, dtype=compute, device=device)
        if path.endswith("scale"):
            value.fill_(1.0)
        else:
            value.normal_(std=_INIT_STD, generator=generator)
        _assign(module, path, value, quantize)
    return torchtune_compat.TorchtuneModel(module, spec, content, None)


def _precision(dtype: str, quantize: Literal["nf4"] | None) -> tuple[torch.dtype, Literal["nf4"] | None]:
    if dtype == "nf4":
        return torch.bfloat16, "nf4"
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype must be bf16, fp32 or nf4, got {dtype!r}")
    if quantize not in (None, "nf4"):
        raise ModelError(f"quantize must be nf4 or nothing, got {quantize!r}")
    return DTYPES[dtype], quantize


def _spec(checkpoint: Checkpoint) -> ModelSpec:
    config = checkpoint.config
    if architecture(config) in DENSE_FAMILIES:
        spec = ModelSpec.from_config(config, source=checkpoint.source, commit=checkpoint.commit)
    else:
        from plora.models import hf_compat

        spec = hf_compat.spec_from_config(config, checkpoint.source, checkpoint.commit)
    return replace(spec, name=short_name(checkpoint.source))


def _match(
    module: nn.Module, spec: ModelSpec, tensors: Mapping[str, TensorInfo], folder: Path
) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint by the parameter that they fill; all that does not fit is named at once."""
    names = dict(torchtune_compat.hf_parameter_names(module))
    mistakes, matched = [], {}
    for path, parameter in module.named_parameters():
        name = names[path]
        if name not in tensors:
            mistakes.append(f"{name} {list(parameter.shape)} is missing")
        elif tensors[name].shape != tuple(parameter.shape):
            shapes = f"{list(tensors[name].shape)} in {tensors[name].file.name}, {list(parameter.shape)} by config.json"
            mistakes.append(f"{name} is {shapes}")
        else:
            matched[path] = tensors[name]
    redundant = (*_REDUNDANT, "lm_head.weight") if spec.tied_embeddings else _REDUNDANT
    unknown = [name for name in tensors if name not in names.values() and not name.endswith(redundant)]
    mistakes += [f"{name} {list(tensors[name].shape)} has no place in a {spec.architecture}" for name in unknown]
    if mistakes:
        shown = "; ".join(mistakes[:8]) + (f"; and {len(mistakes) - 8} more" if len(mistakes) > 8 else "")
        raise ModelError(f"the weights in {folder} do not match its config.json: {shown}. Use matching files")
    return matched


def _fill(
    module: nn.Module,
    spec: ModelSpec,
    tensors: Mapping[str, TensorInfo],
    dtype: torch.dtype,
    quantize: str | None,
    device: torch.device | str,
) -> None:
    """Loads one tensor at a time, so that the host never holds the model twice."""
    names = dict(torchtune_compat.hf_parameter_names(module))
    paths = {names[path]: path for path in tensors}
    for name, value in read_tensors({names[path]: info for path, info in tensors.items()}):
        rows = torchtune_compat.import_rows(paths[name], spec)
        value = value if rows is None else value[rows]
        _assign(module, paths[name], value.to(device=device, dtype=dtype), quantize)


def _assign(module: nn.Module, path: str, value: torch.Tensor, quantize: str | None) -> None:
    owner, _, leaf = path.rpartition(".")
    holder = module.get_submodule(owner)
    linear = isinstance(holder, nn.Linear) and path.startswith("layers.") and leaf == "weight"
    parameter = to_nf4_parameter(value) if quantize and linear else nn.Parameter(value, requires_grad=False)
    setattr(holder, leaf, parameter)
