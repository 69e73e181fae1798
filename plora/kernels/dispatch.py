"""Which implementation of the packed products runs, and why."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from plora.kernels import schedule

VARIABLE = "PLORA_BACKEND"
_NO_DEVICE = "torch sees no CUDA device"
_NAMES = ("cuda", "grouped", "reference")


@dataclass(frozen=True)
class Backend:
    """The implementation in use for bf16 tensors on a CUDA device; everything else is the reference's.

    Args:
        name: ``"cuda"``, our kernels; ``"grouped"``, torch's grouped product; or ``"reference"``, a loop.
        reason: why this one.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def backend() -> Backend:
    """The implementation that the packed products use.

    Set the environment variable PLORA_BACKEND to ``cuda``, ``grouped`` or ``reference`` to override the choice.

    Raises:
        ValueError: if PLORA_BACKEND is none of them.
        RuntimeError: if it asks for one that cannot run.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", *_NAMES):
        raise ValueError(f"{VARIABLE} must be {', '.join(map(repr, _NAMES))}, got {wanted!r}")
    obstacles = {"cuda": _obstacle(), "grouped": _no_grouped_product(), "reference": None}
    if wanted:
        if obstacles[wanted] is not None:
            raise RuntimeError(f"{VARIABLE}={wanted}, but {obstacles[wanted]}")
        return Backend(wanted, f"{VARIABLE} is set")
    if obstacles["cuda"] is None:
        return Backend("cuda", "the extension is built and a GPU is present")
    return Backend("reference" if obstacles["grouped"] else "grouped", obstacles["cuda"])


@cache
def extension() -> ModuleType | None:
    """The compiled kernels, if they were built for this torch."""
    try:
        found = importlib.import_module("plora.kernels._cuda")
    except ImportError:
        return None
    for name in schedule.MIRRORED:
        assert getattr(found, name) == getattr(schedule, name), name
    return found


def kernels() -> ModuleType:
    """The compiled kernels, for those that run only where they were chosen."""
    found = extension()
    assert found is not None
    return found


@cache
def _no_grouped_product() -> str | None:
    """What stands in the way of torch's grouped product."""
    if not torch.cuda.is_available():
        return _NO_DEVICE
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU has no bf16 products"
    return None if hasattr(torch, "_grouped_mm") else f"torch {torch.__version__} has no grouped product"


@cache
def _obstacle() -> str | None:
    if not torch.cuda.is_available():
        return _NO_DEVICE
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the GPU has compute capability {major}.{minor} and the kernels need 8.0"
    if extension() is None:
        return "the extension is not built: run `pip install --no-build-isolation -e '.[cuda]'` where nvcc is installed"
    return None
