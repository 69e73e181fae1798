"""A sweep from Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plora.config.loading import load
from plora.engine.sweep import Sweep
from plora.report.sweep_result import SweepResult


def sweep(config: str | Path | Mapping[str, Any], **overrides: Any) -> SweepResult:
    """Run a whole sweep.

    Args:
        config: a YAML file, a shipped configuration such as ``"plora/quickstart"``, or the configuration itself.
        overrides: settings to change, nested ones with two underscores for the dot: ``trial__lr=1e-4``.

    Returns:
        ``results`` (a DataFrame), ``best`` and ``study``.

    Raises:
        ConfigError: with every mistake found, before anything expensive.
        ValueError: for ``plan_only``, which has no results.
        DiskFullError: if the disk fills up in mid-run; says what is kept.
    """
    running = Sweep(load(config, {key.replace("__", "."): value for key, value in overrides.items()}))
    if running.config.plan_only:
        raise ValueError("plan_only shows a plan on the terminal and has no results: use `plora run`, or leave it out")
    try:
        running.setup()
        running.plan()
        running.run()
        return running.report()
    finally:
        running.cleanup()
