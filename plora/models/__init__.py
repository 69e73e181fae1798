"""Base models: what a checkpoint holds (without torch), and loading it for packed training.

Names are imported on first use, so that planning can read `ModelSpec` without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from plora.models.spec import LinearSpec, ModelError, ModelSpec

if TYPE_CHECKING:
    from plora.models.attention import PackedSequences
    from plora.models.base import BaseModel
    from plora.models.cache import KVCache
    from plora.models.hub import Checkpoint, resolve
    from plora.models.loading import check, from_config, from_pretrained, inspect
    from plora.models.smollm import smollm2

_HOMES = {
    "BaseModel": "base",
    "Checkpoint": "hub",
    "KVCache": "cache",
    "PackedSequences": "attention",
    "check": "loading",
    "from_config": "loading",
    "from_pretrained": "loading",
    "inspect": "loading",
    "resolve": "hub",
    "smollm2": "smollm",
}

__all__ = [
    "BaseModel",
    "Checkpoint",
    "KVCache",
    "LinearSpec",
    "ModelError",
    "ModelSpec",
    "PackedSequences",
    "check",
    "from_config",
    "from_pretrained",
    "inspect",
    "resolve",
    "smollm2",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'plora.models' has no attribute {name!r}")
    return getattr(import_module(f"plora.models.{_HOMES[name]}"), name)
