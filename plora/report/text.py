"""How numbers and settings are written for people, in every report alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_SHORT = {
    "alpha_over_rank": "α/r",
    "batch_size": "batch",
    "target_modules": "targets",
    "warmup_fraction": "warm-up",
    "weight_decay": "decay",
    "max_grad_norm": "clip",
    "loraplus_ratio": "LoRA+",
    "max_steps": "steps",
    "dataset_options": "data options",
}


def setting_title(name: str) -> str:
    """A short heading for a setting."""
    return _SHORT.get(name, name)


def setting_value(value: Any) -> str:
    """A setting's value, short: ``2e-4``, ``q,v``, ``all-linear``."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return short_float(value)
    if isinstance(value, (list, tuple)):
        return ",".join(
            str(item).removesuffix("_proj") if isinstance(item, str) else setting_value(item) for item in value
        )
    if isinstance(value, Mapping):
        return " ".join(f"{key}={setting_value(item)}" for key, item in value.items()) or "–"
    return str(value)


def short_float(value: float) -> str:
    """Four significant digits, without padding: ``0.0002`` is ``2e-4``."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value != 0 and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def score(value: float | None, error: float | None = None, digits: int = 4) -> str:
    """A score with its standard error: ``0.7123 ± 0.0121``; a dash where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return short_float(value)
    shown = f"{value:.{digits}f}"
    return shown if error is None or not math.isfinite(error) else f"{shown} ± {error:.{digits}f}"


def count(value: float | None) -> str:
    """A large number: ``950``, ``12.3k``, ``4.56M``."""
    if value is None or not math.isfinite(value):
        return "–"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}" if value < 10 else f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """A span of time: ``42s``, ``3m05s``, ``2h07m``, ``3d04h``."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def settings_line(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    """The named settings in one line: ``lr 2e-4 · rank 16``."""
    return " · ".join(
        f"{setting_title(name)} {setting_value(settings.get(name))}" for name in names if name in settings
    )
