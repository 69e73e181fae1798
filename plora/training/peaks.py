"""The memory a process takes at most, between two points of its run."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak bytes on a device from ``reset`` on.

    On a GPU these are torch's own counts. On a CPU it is the resident memory of the process above what it was when
    this was made, where the kernel tells (Linux); elsewhere nothing is known.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._before = _resident("VmRSS") or 0
        self._idle = 0

    def reset(self) -> None:
        """Forget peaks before now, and give idle blocks back so that they count for nobody."""
        gc.collect()
        if self._is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            # What is idle still, CUDA graphs hold.
            self._idle = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            return
        _trim()
        try:
            _CLEAR.write_text("5")
        except OSError:
            return

    @property
    def allocated(self) -> int | None:
        """Most bytes of live tensors; None where nothing is known."""
        if self._is_cuda:
            return torch.cuda.max_memory_allocated(self._device)
        peak = _resident("VmHWM")
        return None if peak is None else max(0, peak - self._before)

    @property
    def reserved(self) -> int | None:
        """Most bytes that torch's allocator held, but for CUDA graphs made before ``reset``; None on a CPU."""
        if not self._is_cuda:
            return None
        # What was idle may be mere fragments, which others used since.
        least = torch.cuda.max_memory_allocated(self._device)
        return max(least, torch.cuda.max_memory_reserved(self._device) - self._idle)


def _trim() -> None:
    """Let the C library give freed memory back to the system, where it can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _resident(name: str) -> int | None:
    """A field of ``/proc/self/status`` in bytes."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[name].split()[0]) * 1024 if name in fields else None
