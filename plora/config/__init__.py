"""Reading a sweep's configuration: YAML and overrides in, typed and checked values out, every mistake at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plora.config.loading import load
    from plora.config.mistakes import ConfigError, Mistake
    from plora.config.run_checks import check_run, check_targets, required_bytes
    from plora.config.schema import SweepConfig

# Resolved on first use: listing the shipped configurations must not load Optuna.
_HOMES = {
    "load": "plora.config.loading",
    "ConfigError": "plora.config.mistakes",
    "Mistake": "plora.config.mistakes",
    "check_run": "plora.config.run_checks",
    "check_targets": "plora.config.run_checks",
    "required_bytes": "plora.config.run_checks",
    "SweepConfig": "plora.config.schema",
}
__all__ = [
    "ConfigError",
    "Mistake",
    "SweepConfig",
    "check_run",
    "check_targets",
    "load",
    "required_bytes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
