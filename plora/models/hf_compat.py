"""Any other causal language model, run by transformers with packed attention.

transformers passes unknown keywords of a model's forward on to its attention function; ours finds the
sequences among them. Every loaded model proves itself on two short sequences: packed together they must
give the logits that transformers' own attention gives them one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from typing_extensions import override

from plora.models.attention import PackedSequences, packed_attention
from plora.models.base import BaseModel, Sequences
from plora.models.quantize import to_nf4_parameter
from plora.models.spec import (
    SHAPE_KEYS,
    LinearSpec,
    ModelError,
    ModelSpec,
    architecture,
    shape_of,
    short_name,
    sliding_window,
)

ATTENTION = "plora_packed"
_KEYWORD = "plora_sequences"
# What some families hand to attention and packed attention does not compute.
_UNSUPPORTED_KEYWORDS = ("softcap", "s_aux", "sinks", "position_bias", "indices")
_ROW_PARALLEL = ("o_proj", "down_proj", "out_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "wo", "w2", "dense")
# Relative error of the logits: fp32 rounds in another order; bf16 also rounds scores that eager attention keeps.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_PROBE_LENGTHS = (5, 3)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function registered with transformers: ``[1, H, T, E]`` to ``[1, T, H, E]``.

    Raises:
        ModelError: if the family asks for more than causal softmax attention.
    """
    sequences = kwargs.get(_KEYWORD)
    if sequences is None:
        raise ModelError(f"{type(module).__name__} does not hand the packed sequences on to its attention")
    for name in _UNSUPPORTED_KEYWORDS:
        if kwargs.get(name) is not None:
            raise ModelError(f"{type(module).__name__} uses {name}, which packed attention does not compute")
    if attention_mask is not None or not getattr(module, "is_causal", True):
        raise ModelError(f"{type(module).__name__} is not plainly causal, and packed attention is")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if isinstance(sequences, PackedSequences):
        out = packed_attention(query, key, value, sequences.cu_seqlens, sequences.max_len, scaling)
    else:
        out = sequences.attend(module, query, key, value, scaling)
    return out[None], None


AttentionInterface.register(ATTENTION, attention)


class HuggingFaceModel(BaseModel):
    """A transformers model; paths are its own."""

    @property
    def model(self) -> PreTrainedModel:
        """The module, as transformers' type."""
        assert isinstance(self.module, PreTrainedModel)
        return self.module

    @property
    @override
    def embedding(self) -> nn.Embedding:
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding

    @property
    @override
    def layers(self) -> nn.ModuleList:
        return _decoder_layers(self.model)

    @property
    @override
    def head_path(self) -> str | None:
        head = self.model.get_output_embeddings()
        return next((path for path, module in self.module.named_modules() if module is head), None)

    @override
    def run_layers(self, embedded: torch.Tensor, positions: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        output = self.model.base_model(
            inputs_embeds=embedded, position_ids=positions, use_cache=False, **{_KEYWORD: sequences}
        )
        return output.last_hidden_state

    @override
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.model.get_output_embeddings()(hidden)
        if self.config.get("logit_scale"):
            logits = logits * self.config["logit_scale"]
        if self.config.get("logits_scaling"):
            logits = logits / self.config["logits_scaling"]
        cap = self.config.get("final_logit_softcapping")
        return torch.tanh(logits / cap) * cap if cap else logits

    @override
    def hf_name(self, module_path: str) -> str:
        try:
            self.module.get_submodule(module_path)
        except AttributeError as error:
            raise ModelError(f"no module of this model is called {module_path!r}") from error
        return module_path

    @override
    def export_rows(self, module_path: str) -> torch.Tensor | None:
        return None


def spec_from_config(config: Mapping[str, Any], source: str = "", commit: str | None = None) -> ModelSpec:
    """The spec of any family, counted on a model without storage.

    Raises:
        ModelError: if transformers does not know the family, or it is no decoder of linear layers.
    """
    with torch.device("meta"):
        model = _from_config(config, torch.float32)
    # transformers maps each family's own key names (n_embd, num_layers) to common ones.
    text = model.config.get_text_config()
    keys = {**text.to_dict(), **{key: getattr(text, key, None) for key in SHAPE_KEYS}}
    shape = shape_of({**keys, "architectures": [architecture(config)]})
    return ModelSpec(
        name=short_name(source) or architecture(config),
        architecture=architecture(config),
        linears=_linears(_decoder_layers(model)[0]),
        n_params=sum(parameter.numel() for parameter in model.parameters()),
        sliding_window=sliding_window(keys),
        source=source,
        commit=commit,
        **shape,
    )


def load(
    folder: Path,
    spec: ModelSpec,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    quantize: str | None,
    device: torch.device | str,
) -> HuggingFaceModel:
    """Loads a local checkpoint through transformers.

    Raises:
        ModelError: if its tensors do not match, or packed attention would differ from the model's own.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            dtype=dtype,
        )
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(f"transformers {transformers.__version__} cannot load {folder}: {error}") from error
    model, report = loaded
    mismatched = [
        f"{name} is {list(ours)}, {list(theirs)} by config.json" for name, ours, theirs in report["mismatched_keys"]
    ]
    missing = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    unknown = [f"{name} has no place in it" for name in sorted(report["unexpected_keys"])]
    if mismatched or missing or unknown:
        found = "; ".join((mismatched + missing + unknown)[:8])
        raise ModelError(f"the weights in {folder} do not match its config.json: {found}. Use matching files")
    return _finish(model, spec, config, folder, quantize, device)


def random(
    config: Mapping[str, Any], dtype: torch.dtype, quantize: str | None, device: torch.device | str, seed: int
) -> HuggingFaceModel:
    """A model with random weights as transformers initialises them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _from_config(config, dtype)
    return _finish(model, spec_from_config(config), config, None, quantize, device)


def _finish(
    model: PreTrainedModel,
    spec: ModelSpec,
    config: Mapping[str, Any],
    folder: Path | None,
    quantize: str | None,
    device: torch.device | str,
) -> HuggingFaceModel:
    if quantize:
        for module in _decoder_layers(model).modules():
            if isinstance(module, nn.Linear):
                module.weight = to_nf4_parameter(module.weight.data.to(device))
    nn.Module.to(model, device)
    base = HuggingFaceModel(model, spec, config, folder)
    _prove(base)
    return base


@torch.no_grad()
def _prove(base: HuggingFaceModel) -> None:
    """Compares packed logits with those of transformers' own attention, sequence by sequence."""
    tokens = torch.arange(1, sum(_PROBE_LENGTHS) + 1, device=base.device) % base.spec.vocab_size
    sequences = PackedSequences.from_lengths(_PROBE_LENGTHS, base.device)
    try:
        packed = base.logits(base.hidden_states(tokens, sequences.positions(), sequences))
    except (TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{base.spec.architecture} cannot run on packed sequences: {error}") from error
    base.model.set_attn_implementation("eager")
    alone = torch.cat([base.model(part[None], use_cache=False).logits[0] for part in tokens.split(_PROBE_LENGTHS)])
    base.model.set_attn_implementation(ATTENTION)
    difference = ((packed - alone).norm() / alone.norm()).item()
    # Written so that NaN fails too.
    if not difference <= _TOLERANCE[base.dtype]:
        raise ModelError(
            f"{base.spec.architecture} cannot be packed exactly: its logits on packed sequences differ from those "
            f"on single ones by {difference:.1e} of their norm: its layers do more than causal attention over tokens"
        )


def _from_config(config: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    content = {name: value for name, value in config.items() if name != "model_type"}
    try:
        parsed = AutoConfig.for_model(config.get("model_type", ""), **content)
        return AutoModelForCausalLM.from_config(parsed, attn_implementation=ATTENTION, dtype=dtype)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{architecture(config)} (model_type {config.get('model_type')!r}) is not a causal language model that "
            f"transformers {transformers.__version__} can run with packed attention: {error}"
        ) from error


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(model).__name__} has no list of {count} decoder layers")


def _linears(layer: nn.Module) -> tuple[LinearSpec, ...]:
    linears = []
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            name = path.rsplit(".", 1)[-1]
            parallel: Literal["column", "row"] = "row" if name in _ROW_PARALLEL else "column"
            linears.append(LinearSpec(name, module.in_features, module.out_features, parallel, module.bias is not None))
    if not linears:
        raise ModelError(f"{type(layer).__name__} has no nn.Linear layers to adapt")
    return tuple(linears)
