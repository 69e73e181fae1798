"""Builds the CUDA kernels where torch has CUDA and nvcc is present; elsewhere installs without them."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
ARCHITECTURES = "8.0;8.6;9.0"


def cutlass_headers() -> Path | None:
    """The folder of the CUTLASS headers: $CUTLASS_INCLUDE, or that of the nvidia-cutlass wheel."""
    if "CUTLASS_INCLUDE" in os.environ:
        return Path(os.environ["CUTLASS_INCLUDE"])
    found = importlib.util.find_spec("cutlass_library")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "source" / "include"


def obstacle() -> str | None:
    """What stands in the way of building the kernels."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not visible to the build (use `pip install --no-build-isolation`)"
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return "nvcc was not found"
    if cutlass_headers() is None:
        return "the CUTLASS headers were not found (`pip install nvidia-cutlass`, or set CUTLASS_INCLUDE)"
    return None


def extension() -> dict[str, object]:
    """The arguments of ``setup`` that build the kernels."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        # A machine with GPUs builds for them alone, any other for every architecture that is tested.
        devices = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{a}.{b}" for a, b in sorted(devices)) or ARCHITECTURES
    sources = sorted(str(path.relative_to(HERE)) for kind in ("*.cu", "*.cpp") for path in (HERE / "csrc").glob(kind))
    module = CUDAExtension(
        "plora.kernels._cuda",
        sources,
        include_dirs=[str(cutlass_headers())],
        extra_compile_args={"cxx": ["-O3"], "nvcc": ["-O3", *os.environ.get("PLORA_NVCC_FLAGS", "").split()]},
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


reason = obstacle()
if reason:
    sys.stderr.write(f"plora: installing without the CUDA kernels, because {reason}\n")
setup(**({} if reason else extension()))
