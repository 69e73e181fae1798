"""plora: many LoRA configurations trained at once over one frozen base model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plora.engine.api import sweep
    from plora.modules.config import AdapterConfig
    from plora.modules.packed import PackedAdapters, pack_adapters

__version__ = "0.1.0"
# Resolved on first use: `plora ls` must not wait for torch.
_HOMES = {
    "AdapterConfig": "plora.modules.config",
    "PackedAdapters": "plora.modules.packed",
    "pack_adapters": "plora.modules.packed",
    "sweep": "plora.engine.api",
}
__all__ = ["AdapterConfig", "PackedAdapters", "pack_adapters", "sweep"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
