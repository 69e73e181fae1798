"""The packed layer: a frozen linear plus every adapter's low-rank product on its own rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from plora.kernels import ops
from plora.kernels.reference import Tables
from plora.kernels.schedule import DeviceTables


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


class PackedLoRALinear(nn.Module):
    """``y = W x + b``, plus ``scale_k B_k A_k dropout(x)`` on the rows of each adapter ``k``.

    Args:
        base: the frozen linear, of any kind and precision; it is called, never looked into.
        offsets: int64 ``[2 K + 1]``, see ``reference.lora_add``.
        device_offsets: their copy on the device, where the CUDA kernels run.
        shared: the pack's arena and tables.
    """

    def __init__(
        self, base: nn.Linear, offsets: torch.Tensor, device_offsets: torch.Tensor | None, shared: Shared
    ) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.offsets, self.device_offsets, self.shared = offsets, device_offsets, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., in_features]``, whose leading dimensions flatten to the routed rows, to ``[..., out_features]``."""
        if not torch.compiler.is_compiling():
            _refuse_reentrant_checkpoint()
        y, shared = self.base(x), self.shared
        dtype = shared.weight.dtype
        out, _ = ops.lora_add(
            x.reshape(-1, self.in_features).to(dtype),
            y.reshape(-1, self.out_features).to(dtype),
            shared.anchor,
            shared.weight,
            shared.gradients.handle,
            shared.routed,
            self.offsets,
            shared.tables.as_list(),
            self._device_tables(),
            shared.token_index,
            shared.max_rank,
        )
        return out.view(y.shape).to(y.dtype)

    def _device_tables(self) -> list[torch.Tensor]:
        if self.shared.device_tables is None or self.device_offsets is None:
            return []
        return [*self.shared.device_tables.as_list(), self.device_offsets]


def _refuse_reentrant_checkpoint() -> None:
    """Reentrant checkpointing recomputes inside backward, without the hooks of the non-reentrant kind.

    It loses the gradients of a segment whose input needs none, such as the first layer's.
    """
    if torch._C._current_graph_task_id() == -1 or torch._C._autograd._top_saved_tensors_default_hooks(False):
        return
    raise RuntimeError(
        "reentrant activation checkpointing would lose adapter gradients: "
        "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
    )
