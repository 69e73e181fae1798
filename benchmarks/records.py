"""Figures with their provenance: what every benchmark prints, and writes with ``--json FILE``."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class Records:
    """Collects the figures of one benchmark.

    Args:
        bench: its name, e.g. ``"step"``.
        device: what it ran on; the GPU, or the processor, where not given.
    """

    def __init__(self, bench: str, device: str | None = None) -> None:
        self.bench = bench
        self.rows: list[dict[str, Any]] = []
        self._provenance = {
            "device": device or _device(),
            "torch": _torch_version(),
            "commit": _commit(),
            "date": datetime.date.today().isoformat(),
        }

    def add(self, case: str, provider: str, metric: str, value: float, unit: str, notes: str = "") -> None:
        """One figure of ``provider`` in ``case``."""
        self.rows.append(
            {"bench": self.bench, "case": case, "provider": provider, "metric": metric, "value": value, "unit": unit}
            | self._provenance
            | {"notes": notes}
        )

    def write(self, path: str | Path | None) -> None:
        """All figures as a JSON list; nothing where ``path`` is None."""
        if path is not None:
            Path(path).write_text(json.dumps(self.rows, indent=1) + "\n")

    def table(self) -> str:
        """One line a case and provider, one column a metric."""
        metrics = list(dict.fromkeys(f"{row['metric']} [{row['unit']}]" for row in self.rows))
        lines: dict[tuple[str, str], dict[str, float]] = {}
        for row in self.rows:
            lines.setdefault((row["case"], row["provider"]), {})[f"{row['metric']} [{row['unit']}]"] = row["value"]
        width = max(len(f"{case}  {provider}") for case, provider in lines)
        head = f"{'':{width}}  " + "  ".join(metrics)
        body = [
            f"{f'{case}  {provider}':{width}}  "
            + "  ".join(f"{figures[name]:>{len(name)}.4g}" if name in figures else " " * len(name) for name in metrics)
            for (case, provider), figures in lines.items()
        ]
        return "\n".join([head, *body])


def _device() -> str:
    try:
        import torch
    except ImportError:
        return platform.processor() or platform.machine()
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def _torch_version() -> str:
    try:
        import torch
    except ImportError:
        return ""
    return torch.__version__


def _commit() -> str:
    """The commit measured; ``PLORA_COMMIT`` where the sources travel without their repository."""
    if "PLORA_COMMIT" in os.environ:
        return os.environ["PLORA_COMMIT"]
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
