from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    """The smallest sweep that has a search."""
    return {
        "output_dir": str(tmp_path / "run"),
        "model": {"source": "a/model"},
        "dataset": {"_component_": "plora.data.dates"},
        "search": {"n_trials": 4, "space": {"lr": {"low": 1e-5, "high": 1e-3, "log": True}}},
    }
