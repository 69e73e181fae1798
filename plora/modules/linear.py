"""The packed layer: a frozen linear plus every adapter's low-rank product on its own rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, SupportsIndex, TypeVar

import torch
from torch import nn

from plora.kernels import ops
from plora.kernels.reference import Tables
from plora.kernels.schedule import DeviceTables

Module = TypeVar("Module", bound=nn.Module)


@dataclass
class Shared:
    """What all packed layers of a model read in a forward pass.

    Compiled code reads these tensors, never Python lists, so new segment lengths and new adapters
    need no recompilation.
    """

    anchor: torch.Tensor
    weight: torch.Tensor
    gradients: ops.GradientBuffer
    routed: torch.Tensor
    tables: Tables
    device_tables: DeviceTables | None  # where the CUDA kernels run
    token_index: torch.Tensor
    max_rank: int


@dataclass(eq=False)
class Group:
    """The packed products of one to three linears that read the same input.

    Args:
        offsets: int64 ``[n, 2 K + 1]``, see ``reference.lora_down``.
        device_offsets: their copy on the device, where the CUDA kernels run.
        shared: the pack's arena and tables.
    """

    offsets: torch.Tensor
    device_offsets: torch.Tensor | None
    shared: Shared

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., D]`` to hidden ``[T, n R]``."""
        shared = self.shared
        return ops.lora_down(
            self._rows(x),
            shared.anchor,
            shared.weight,
            shared.gradients.handle,
            shared.routed,
            self.offsets,
            shared.tables.as_list(),
            self.device_tables(self.device_offsets),
            shared.token_index,
            shared.max_rank,
        )

    def up(
        self, ys: Sequence[torch.Tensor], hidden: torch.Tensor, residual: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """What the frozen linears give, each ``[..., N]``, with the adapters' products added.

        ``residual``: of the shape of the only one of ``ys``, and added to it too.
        """
        shared = self.shared
        if residual is not None and not (residual.dtype == ys[0].dtype == shared.weight.dtype):
            return [residual + self.up(ys, hidden)[0]]  # the pass would round it
        outs = ops.lora_up(
            [self._rows(y) for y in ys],
            None if residual is None else self._rows(residual),
            hidden,
            shared.weight,
            shared.gradients.handle,
            self.offsets,
            shared.tables.as_list(),
            self.device_tables(self.device_offsets),
            shared.token_index,
        )
        return [out.view(y.shape).to(y.dtype) for out, y in zip(outs, ys, strict=True)]

    def swiglu(
        self, gate: torch.Tensor, up: torch.Tensor, hidden: torch.Tensor, down: Group
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``silu(gate) * up`` with the adapters' products added to both, and ``down.down`` of it.

        Args:
            gate: ``[..., F]``, what the frozen linear gives. up: likewise. hidden: of the two.
            down: of the linear that reads the result.
        """
        shared = self.shared
        act, hidden_down = ops.lora_swiglu(
            self._rows(gate),
            self._rows(up),
            hidden,
            shared.weight,
            shared.gradients.handle,
            self.offsets,
            down.offsets,
            shared.tables.as_list(),
            self.device_tables(self.device_offsets, down.device_offsets),
            shared.token_index,
            shared.max_rank,
        )
        return act.view(gate.shape).to(gate.dtype), hidden_down

    def device_tables(self, *offsets: torch.Tensor | None) -> list[torch.Tensor]:
        """What the CUDA kernels read: the work lists, then the offsets; nothing where the reference runs."""
        tables = self.shared.device_tables
        here = [each for each in offsets if each is not None]
        return [*tables.as_list(), *here] if tables is not None and len(here) == len(offsets) else []

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, x.shape[-1]).to(self.shared.weight.dtype)


class PackedLoRALinear(nn.Module):
    """``y = W x + b``, plus ``scale_k B_k A_k dropout(x)`` on the rows of each adapter ``k``.

    Args:
        base: the frozen linear, of any kind and precision; it is called, never looked into.
    """

    # Set by the pack, anew whenever it has replaced a tensor.
    group: Group
    # Of all linears of this one's input group; the first of them holds it.
    siblings: Group
    # See `add`.
    takes_residual = True

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x [..., in_features]``, whose leading dimensions flatten to the routed rows, to ``[..., out_features]``."""
        refuse_reentrant_checkpoint()
        return self.group.up([self.base(x)], self.group.down(x), residual)[0]


def project(linears: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """What each of ``linears`` makes of ``x [..., D]``, in one pass over x for all adapters where they are packed.

    Args:
        linears: those that read x, such as q_proj, k_proj and v_proj, in the model's order.
        x: their input.
    """
    packed = [linear for linear in linears if isinstance(linear, PackedLoRALinear)]
    if len(packed) < len(linears) or len(packed[0].siblings.offsets) != len(linears):
        return [linear(x) for linear in linears]
    refuse_reentrant_checkpoint()
    hidden = packed[0].siblings.down(x)
    return packed[0].siblings.up([linear.base(x) for linear in packed], hidden)


def add(residual: torch.Tensor, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``residual + module(x)``, in the pass that ends the module where packed products do."""
    if getattr(module, "takes_residual", False):
        out: torch.Tensor = module(x, residual)
        return out
    return residual + module(x)


def refuse_reentrant_checkpoint() -> None:
    """Reentrant checkpointing recomputes inside backward, without the hooks of the non-reentrant kind.

    It loses the gradients of a segment whose input needs none, such as the first layer's.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return
    if torch._C._autograd._top_saved_tensors_default_hooks(False):
        return
    raise RuntimeError(
        "reentrant activation checkpointing would lose adapter gradients: "
        "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
    )


def refuse_to_pickle(module: nn.Module, protocol: SupportsIndex) -> NoReturn:
    """In place of ``__reduce_ex__``: what the layers of a packed model share would come back as copies of it."""
    raise TypeError(
        f"a packed model cannot be pickled ({type(module).__name__}): save packed.state_dict(), "
        "or write the adapters with plora.checkpoint.peft.export_adapter"
    )


def deep_copy(module: Module, memo: dict[int, Any]) -> Module:
    """For ``__deepcopy__`` of what refuses to be pickled, by which Python would copy it."""
    clone = type(module).__new__(type(module))
    memo[id(module)] = clone
    clone.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return clone
