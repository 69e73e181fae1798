"""A launch that fails names the kernel and its parameters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# A failed device-side assertion makes every launch after it fail, for good: hence a process of its own.
SCRIPT = """
import torch
from plora import AdapterConfig, pack_adapters
from tests.modules.toy import Toy

model = Toy().to("cuda", torch.bfloat16)
packed = pack_adapters(model, [AdapterConfig(rank=4)])
x = torch.randn(5, 16, device="cuda", dtype=torch.bfloat16)
with packed.route([5]):
    torch.arange(3, device="cuda")[torch.tensor([7], device="cuda")]
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        pass
    model.layers[0].q_proj.group.down(x)
"""


@pytest.mark.gpu
def test_names_the_kernel_and_its_parameters() -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, timeout=120)
    assert "the CUDA kernel down failed to launch: " in run.stderr
    assert "(rows 5, width 16, hidden columns 16" in run.stderr
