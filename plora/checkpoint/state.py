"""Exact adapter states in one safetensors file: what a trial's weights were, to the bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plora.checkpoint.atomic import atomic_file

_METADATA_KEY = "plora"


def save_state(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes ``tensors`` (any shapes, each in its own dtype) and ``metadata`` (JSON values), atomically.

    Tensors may be views of larger storage and may lie on any device; only their own elements are written.
    """
    # safetensors refuses tensors that share storage, as views of one arena do.
    on_host = {name: tensor.detach().to("cpu", copy=True).contiguous().clone() for name, tensor in tensors.items()}
    with atomic_file(path) as partial:
        save_file(on_host, partial, metadata={_METADATA_KEY: json.dumps(dict(metadata))})


def load_state(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What ``save_state`` wrote, on the CPU.

    Raises:
        ValueError: if the file is damaged or was not written by ``save_state``.
        FileNotFoundError: if there is none.
    """
    tensors, header = read_safetensors(path)
    if _METADATA_KEY not in header:
        raise ValueError(f"{path} is not an adapter state of plora: its header has no {_METADATA_KEY!r} entry")
    return tensors, json.loads(header[_METADATA_KEY])


def read_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its header's metadata.

    Raises:
        ValueError: if the file is damaged; the message names it.
        FileNotFoundError: if there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such weights file: {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        size = Path(path).stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is corrupt or truncated: {error}. Write or download it again"
        ) from error
