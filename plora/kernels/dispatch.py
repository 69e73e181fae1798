"""Which implementation of the packed products runs, and why."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

VARIABLE = "PLORA_BACKEND"


@dataclass(frozen=True)
class Backend:
    """The implementation in use for bf16 tensors on a CUDA device; everything else is the reference's.

    Args:
        name: ``"cuda"`` or ``"reference"``.
        reason: why this one.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def backend() -> Backend:
    """The implementation that the packed products use.

    Set the environment variable PLORA_BACKEND to ``reference`` or ``cuda`` to override the choice.

    Raises:
        ValueError: if PLORA_BACKEND is neither.
        RuntimeError: if it asks for the CUDA kernels and they cannot run.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "reference", "cuda"):
        raise ValueError(f"{VARIABLE} must be 'reference' or 'cuda', got {wanted!r}")
    if wanted == "reference":
        return Backend("reference", f"{VARIABLE} is set")
    obstacle = _obstacle()
    if obstacle is None:
        return Backend("cuda", f"{VARIABLE} is set" if wanted else "the extension is built and a GPU is present")
    if wanted:
        raise RuntimeError(f"{VARIABLE}=cuda, but {obstacle}")
    return Backend("reference", obstacle)


@cache
def extension() -> ModuleType | None:
    """The compiled kernels, if they were built for this torch."""
    try:
        return importlib.import_module("plora.kernels._cuda")
    except ImportError:
        return None


@cache
def _obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor} and the kernels need 8.0"
    if extension() is None:
        return "the extension is not built: run `pip install --no-build-isolation -e '.[cuda]'` where nvcc is installed"
    return None
