"""A CUDA graph's like on the CPU: operators on tensors that keep their place, run again from the same places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What makes the host wait for the device, or copies from its memory: a capture refuses these.
REFUSED = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.equal.default,
)


class EmulatedGraph(TorchDispatchMode):
    """Captures a step, which changes nothing, and replays its operators on the very tensors it met.

    A tensor that the caller has exchanged for another since is read where it was, as a graph would.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.replays = 0
        try:
            with self:
                step()
        finally:
            for storage, content in self._before.values():
                storage.copy_(content)

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, outs in self._calls:
            for old, new in zip(outs, _tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for spec, value in zip(func._schema.arguments, args, strict=False):
            if spec.alias_info is not None and spec.alias_info.is_write:
                storage = value.untyped_storage()
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        outs = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, _tensors(outs)))
        return outs


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
