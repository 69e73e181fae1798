"""A frozen base model as training sees it, whichever library built it.

Shapes: ``T`` packed tokens, ``D`` model width, ``V`` vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from plora.models.attention import PackedSequences
from plora.models.cache import Decode, Prefill
from plora.models.quantize import is_nf4
from plora.models.spec import ModelError, ModelSpec

Sequences = PackedSequences | Prefill | Decode


class BaseModel(ABC):
    """A frozen causal language model that runs on packed tokens.

    Args:
        module: what `pack_adapters` packs.
        spec: its shape.
        config: the content of its config.json.
        folder: the local checkpoint, None for random weights.
    """

    def __init__(self, module: nn.Module, spec: ModelSpec, config: Mapping[str, Any], folder: Path | None) -> None:
        self.module = module.requires_grad_(False).eval()
        self.spec = spec
        self.config = dict(config)
        self.folder = folder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def loadable_name(self) -> str:
        """What transformers, peft and vLLM load it by: the hub id, or the folder where it has none."""
        is_local = self.folder is not None and self.spec.commit is None
        return str(self.folder) if is_local else self.spec.source or self.spec.name

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The token embeddings."""

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""

    @property
    @abstractmethod
    def head_path(self) -> str | None:
        """Path of the output head within `module`, None where it is no module of its own."""

    @abstractmethod
    def run_layers(self, embedded: torch.Tensor, positions: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """Decoder layers and final norm: ``[1, T, D]`` and positions ``[1, T]`` to ``[1, T, D]``."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head, with whatever the family does to logits: ``[..., D]`` to ``[..., V]``."""

    @abstractmethod
    def hf_name(self, module_path: str) -> str:
        """``"layers.0.attn.q_proj"`` to the module's name in the Hugging Face model.

        Raises:
            ModelError: if the path is not one of this model's.
        """

    @abstractmethod
    def export_rows(self, module_path: str) -> torch.Tensor | None:
        """Row order ``p`` with ``B_hf = B_ours[p]`` for the module's output, None where they agree."""

    def hidden_states(self, tokens: torch.Tensor, positions: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        """Runs packed tokens up to and including the final norm.

        Where gradients are enabled the embeddings are made a leaf that requires them: without it autograd
        (and the compiler) would drop the first layer's backward, where adapters collect their gradients.

        Args:
            tokens: int64 ``[T]``.
            positions: int64 ``[T]``, place of each token in its sequence.
            sequences: where sequences begin and end, or a view of a `KVCache`.

        Returns:
            ``[T, D]``.

        Raises:
            ModelError: if a sequence is longer than the model can represent exactly.
        """
        if not torch.compiler.is_compiling():
            self.check_length(sequences.longest)
        embedded = self.embedding(tokens[None])
        if torch.is_grad_enabled() and not embedded.requires_grad:
            embedded.requires_grad_()
        if isinstance(sequences, PackedSequences):
            return self.run_layers(embedded, positions[None], sequences)[0]
        # The cache is updated in place and grows by one each time: nothing a compiled graph could keep.
        with torch.compiler.set_stance("force_eager"):
            hidden = self.run_layers(embedded, positions[None], sequences)[0]
        sequences.finish()
        return hidden

    def check_length(self, longest: int) -> None:
        """Refuse what the model cannot represent exactly.

        Args:
            longest: tokens of the longest sequence.

        Raises:
            ModelError: if that is too long.
        """
        if longest > self.spec.max_positions:
            raise ModelError(
                f"a sequence of {longest} tokens exceeds the {self.spec.max_positions} positions of "
                f"{self.spec.name}: lower max_seq_len or max_new_tokens"
            )
        if self.spec.sliding_window is not None and longest > self.spec.sliding_window:
            raise ModelError(
                f"{self.spec.name} attends within a window of {self.spec.sliding_window} tokens, which packed "
                f"attention does not do; a sequence of {longest} tokens would differ: lower max_seq_len"
            )

    def set_activation_checkpointing(self, enabled: bool | int) -> None:
        """Recomputes decoder layers in backward (non-reentrant checkpoints) instead of keeping their activations.

        Args:
            enabled: whether each layer is, or how many are. Those are spread evenly, and the last one is among them
                only if all are: when backward begins it would be held in full in any case.

        Raises:
            ValueError: if there are not so many layers.
        """
        n_layers = len(self.layers)
        count = enabled * n_layers if isinstance(enabled, bool) else enabled
        if not 0 <= count <= n_layers:
            raise ValueError(f"activation_checkpointing must be from 0 to the {n_layers} layers, got {enabled}")
        others = n_layers - 1
        for index, layer in enumerate(self.layers):
            kind = type(layer)
            wanted = count == n_layers or (index < others and index * count % others < count)
            if wanted and not issubclass(kind, _Recomputed):
                layer.__class__ = _recomputed(kind)
            elif not wanted and issubclass(kind, _Recomputed):
                layer.__class__ = kind.__mro__[2]

    @property
    def activation_checkpointing(self) -> bool | int:
        """Whether decoder layers are recomputed in backward, or how many where not all are."""
        count = sum(isinstance(layer, _Recomputed) for layer in self.layers)
        return count == len(self.layers) if count in (0, len(self.layers)) else count

    def compile_layers(
        self, *, dynamic: bool | None = True, fullgraph: bool = False, backend: str = "inductor"
    ) -> None:
        """Compiles each decoder layer in place; equal layers share one compiled graph.

        Call it after `pack_adapters` and `set_activation_checkpointing`. Generation stays eager. Two of torch's
        settings change for the process: floats are constants of compiled code, and sizes that are equal the first
        time are not taken to be so always.

        Args:
            dynamic: as `torch.compile`'s; True so that microbatches of other sizes compile nothing anew.
            fullgraph: raise where a layer does not compile into one graph.
            backend: as `torch.compile`'s.
        """
        from plora.models.compiler import layer_compiler  # imports the compiler, which takes seconds

        # Else a norm's epsilon would be an input that may change: a tensor on the host, in a graph for the device.
        torch._dynamo.config.specialize_float = True
        # Else sizes that happen to be equal the first time, such as of sequences and of linears that share an input,
        # are taken to be one, and layers are compiled anew when they differ.
        torch.fx.experimental._config.use_duck_shape = False
        is_quantized = any(is_nf4(parameter) for parameter in self.layers.parameters())
        for layer in self.layers:
            layer.compile(dynamic=dynamic, fullgraph=fullgraph, backend=layer_compiler(backend, is_quantized))


class _Recomputed(nn.Module):
    """A decoder layer whose activations are recomputed in backward.

    The layer's class is exchanged rather than the layer wrapped: parameter and module names stay as they are.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


_RECOMPUTED_KINDS: dict[type[nn.Module], type[nn.Module]] = {}


def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """The checkpointed class of a layer class: one for all layers, so that they share compiled code."""
    if kind not in _RECOMPUTED_KINDS:
        _RECOMPUTED_KINDS[kind] = type(f"Recomputed{kind.__name__}", (_Recomputed, kind), {})
    return _RECOMPUTED_KINDS[kind]
