"""Packed multi-adapter layers for any model whose linear layers are ``nn.Linear``."""

from plora.modules.config import AdapterConfig
from plora.modules.packed import PackedAdapters, pack_adapters

__all__ = ["AdapterConfig", "PackedAdapters", "pack_adapters"]
