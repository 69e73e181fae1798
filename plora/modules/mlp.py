"""Gated MLPs, ``down(silu(gate(x)) * up(x))``, whose packed products ride on the activation.

What the adapters add to gate and up, and what the next linear's adapters read, then cost no pass of their
own over the widest activations of the model. A module is recognised by the names of its parts and by what
it computes, so torchtune's and Hugging Face's serve alike; its class is exchanged rather than the module
wrapped, so that names stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from plora.modules.linear import PackedLoRALinear, deep_copy, refuse_reentrant_checkpoint, refuse_to_pickle

# Names of gate, up and down: Hugging Face's and torchtune's.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class _Fused(nn.Module):
    """A gated MLP that makes one pass where its class would make three."""

    fused_names: tuple[str, str, str]
    takes_residual = True

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``[..., D]`` to ``[..., D]``, the residual added."""
        refuse_reentrant_checkpoint()
        gate, up, down = (getattr(self, name) for name in self.fused_names)
        hidden = gate.siblings.down(x)
        act, hidden_down = gate.siblings.swiglu(gate.base(x), up.base(x), hidden, down.group)
        return down.group.up([down.base(act)], hidden_down, residual)[0]

    __reduce_ex__ = refuse_to_pickle
    __deepcopy__ = deep_copy


_FUSED_KINDS: dict[tuple[type[nn.Module], tuple[str, str, str]], type[nn.Module]] = {}


def fuse_gated_mlps(model: nn.Module) -> None:
    """Exchange the class of every gated MLP of packed linears in ``model``."""
    computes: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        names = _parts(module)
        kind = type(module)
        if names is None:
            continue
        if kind not in computes:
            computes[kind] = _computes_swiglu(module, names)
        if computes[kind]:
            module.__class__ = _fused(kind, names)


def restore_gated_mlps(model: nn.Module) -> None:
    """Undo ``fuse_gated_mlps``."""
    for module in model.modules():
        if isinstance(module, _Fused):
            module.__class__ = type(module).__mro__[2]


def _fused(kind: type[nn.Module], names: tuple[str, str, str]) -> type[nn.Module]:
    """The fused class of an MLP class: one for all layers, so that they share compiled code."""
    if (kind, names) not in _FUSED_KINDS:
        made = type(f"Fused{kind.__name__}", (_Fused, kind), {"fused_names": names})
        _FUSED_KINDS[kind, names] = made
    return _FUSED_KINDS[kind, names]


def _parts(module: nn.Module) -> tuple[str, str, str] | None:
    """The names of the packed gate, up and down of a module that has these and nothing else to learn."""
    for names in _NAMES:
        parts = [getattr(module, name, None) for name in names]
        linears = [part for part in parts if isinstance(part, PackedLoRALinear)]
        others = [child for child in module.children() if child not in linears]
        if len(linears) == 3 and not any(True for child in others for _ in child.parameters()):
            gate, up, down = linears
            first, second = gate.siblings.offsets.data_ptr(), gate.group.offsets.data_ptr()
            pair = len(gate.siblings.offsets) == 2 and first == second  # gate before up
            if pair and gate.out_features == up.out_features == down.in_features:
                return names
    return None


@torch.no_grad()
def _computes_swiglu(module: nn.Module, names: tuple[str, str, str]) -> bool:
    """Whether the module's own forward is the formula, tried on stand-ins for its linears."""
    width, generator = 8, torch.Generator().manual_seed(0)
    parts: dict[str, Any] = {name: getattr(module, name) for name in names}
    x, *weights = (torch.randn(width, width, generator=generator, device="cpu") for _ in range(4))
    training = module.training
    try:
        for name, weight in zip(names, weights, strict=True):
            linear = nn.Linear(width, width, bias=False, device="cpu")
            linear.weight.copy_(weight)
            setattr(module, name, linear)
        module.eval()
        gate, up, down = weights
        return torch.allclose(module(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T, rtol=1e-4, atol=1e-4)
    except (TypeError, RuntimeError):  # it wants other arguments, or shapes of its own
        return False
    finally:
        module.train(training)
        for name, part in parts.items():
            setattr(module, name, part)
