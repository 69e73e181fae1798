"""Checkpoints shared by the tests of models."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models import tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint folder of every tiny model."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny.saved(name, root / name) for name in tiny.CONFIGS}


@pytest.fixture(scope="session")
def references(folders: dict[str, Path]) -> dict[str, PreTrainedModel]:
    """The same as transformers loads them."""
    return {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}
