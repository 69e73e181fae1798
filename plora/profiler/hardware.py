"""Devices: what data sheets say of the GPUs people train on, and the memory that is free here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from plora.profiler.memory import GIB, MIB

# A CUDA context and NCCL's buffers, which a data sheet does not subtract.
CONTEXT_BYTES = 700 * MIB


@dataclass(frozen=True)
class GPU:
    """A device as its data sheet describes it.

    Args:
        name: the name used in configurations.
        tflops: dense bf16 products with fp32 accumulation, TFLOP/s.
        bandwidth: memory bandwidth, bytes/s.
        memory_bytes: what the driver reports as total.
        link: bytes/s that a device sends to its neighbours in an all-reduce.
        link_latency: seconds of one small all-reduce.
    """

    name: str
    tflops: float
    bandwidth: float
    memory_bytes: int
    link: float
    link_latency: float = 15e-6

    @property
    def free_bytes(self) -> int:
        """Bytes that a fresh process finds free."""
        return self.memory_bytes - CONTEXT_BYTES


# From the makers' data sheets; memory as drivers report it. L4 and A10 sit on PCIe 4.0 x16, the RTX 4090 too but
# without peer-to-peer copies, so its all-reduce goes through the host.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100_40gb", 312, 1.555e12, int(39.4 * GIB), 240e9),
        GPU("a100_80gb", 312, 2.039e12, int(79.1 * GIB), 240e9),
        GPU("a10", 125, 0.600e12, int(22.1 * GIB), 20e9, 40e-6),
        GPU("l4", 121, 0.300e12, int(22.1 * GIB), 20e9, 40e-6),
        GPU("h100", 989, 3.35e12, int(79.1 * GIB), 360e9),
        GPU("h200", 989, 4.80e12, int(139.8 * GIB), 360e9),
        GPU("rtx_4090", 165, 1.008e12, int(23.5 * GIB), 10e9, 60e-6),
    )
}

# With an underscore for what separates words.
_ALIASES = {
    "a100_sxm4_40gb": "a100_40gb",
    "a100_pcie_40gb": "a100_40gb",
    "a100_sxm4_80gb": "a100_80gb",
    "a100_80gb_pcie": "a100_80gb",
    "a100": "a100_80gb",
    "geforce_rtx_4090": "rtx_4090",
    "rtx4090": "rtx_4090",
    "4090": "rtx_4090",
}


def find_gpu(name: str) -> GPU:
    """The data sheet of a GPU by our name or by the name its driver gives (``NVIDIA H100 80GB HBM3``).

    Raises:
        ValueError: if there is none.
    """
    key = re.sub(r"[\s_-]+", "_", name.strip().lower()).removeprefix("nvidia_")
    key = _ALIASES.get(key, key)
    if key in GPUS:
        return GPUS[key]
    for prefix in ("h200", "h100", "a10", "l4"):
        if key.split("_")[0] == prefix:
            return GPUS[prefix]
    raise ValueError(f"no data sheet for the GPU {name!r}: use one of {', '.join(sorted(GPUS))}")


def host_free_bytes() -> int:
    """Bytes of memory this process can still take on the host: available RAM within the control group's limit."""
    free = psutil.virtual_memory().available
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and used is not None:
        # Page cache is counted as used but given back under pressure.
        free = min(free, limit - used + _cgroup_page_cache())
    return max(0, free)


def _cgroup_bytes(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_page_cache() -> int:
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    stat = dict(line.split() for line in lines)
    return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
