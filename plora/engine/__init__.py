"""Carrying a sweep out: from a checked configuration to ranked results."""

from plora.engine.sweep import Sweep

__all__ = ["Sweep"]
