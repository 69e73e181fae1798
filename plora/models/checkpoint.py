"""Reading safetensors checkpoints: what they hold, checked against the file's size before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from plora.models.spec import ModelError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_LOADABLE = ("F64", "F32", "F16", "BF16")
# safetensors itself refuses longer headers.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored and what its file says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Raises:
        ModelError: if it is missing, unreadable, or describes weights that are quantized already.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json: give a folder in Hugging Face format, or a hub id")
    config = read_json(path)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"{folder} holds weights quantized with {method}: use the original checkpoint, with dtype: nf4 "
            "where memory is short"
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: naming the file, if it is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        ModelError: if there are none, or one that the index names is missing.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {', '.join(missing)}, named in {INDEX_NAME}: download them again")
        if files:
            return files
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise ModelError(
            f"{folder} holds pickled weights (.bin), which can run code when loaded; convert them once: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(new_folder), "
            "in an environment that you trust them in, and give the new folder"
        )
    raise ModelError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}: is the download complete?")


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint, from the headers alone.

    Raises:
        ModelError: naming the file that is missing, truncated or corrupt, or a tensor of a type that
            cannot be a base weight.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        for name, entry in _read_header(file).items():
            info = TensorInfo(file, entry["dtype"], tuple(entry["shape"]))
            if info.dtype not in _LOADABLE:
                raise ModelError(
                    f"{file}: tensor {name} is stored as {info.dtype}; only {', '.join(_LOADABLE)} can be "
                    "a base: use the checkpoint that is not quantized"
                )
            tensors[name] = info
    return tensors


def read_tensors(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    """Reads the given tensors file by file, one in memory at a time."""
    ordered = sorted(tensors.items(), key=lambda item: str(item[1].file))
    for file, group in groupby(ordered, key=lambda item: item[1].file):
        with safe_open(file, framework="pt") as opened:
            for name, _ in group:
                yield name, opened.get_tensor(name)


def _read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes of length, then JSON; data follows to the end of the file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"{file} is truncated or no safetensors file ({size} bytes): download it again")
        raw = opened.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{file} has a corrupt safetensors header ({error}): download it again") from error
    expected = 8 + length + end
    if size != expected:
        kind = "truncated" if size < expected else "corrupt"
        raise ModelError(f"{file} is {kind}: {size} bytes instead of {expected}: download it again")
    return header
