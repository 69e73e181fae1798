"""Which backend runs, and that the choice says why."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from plora.kernels import Backend, backend, ops
from plora.models import compiler


def test_compiled_graphs_on_disk_are_of_these_operators():
    for module in (ops, compiler):
        content = Path(module.__file__).read_bytes()
        assert hashlib.sha256(content).hexdigest()[:16] in torch.compiler.config.cache_key_tag


def test_without_a_gpu_the_reference_runs(monkeypatch):
    monkeypatch.delenv("PLORA_BACKEND", raising=False)
    monkeypatch.setattr("plora.kernels.dispatch._no_grouped_product", lambda: "torch sees no CUDA device")
    monkeypatch.setattr("plora.kernels.dispatch._obstacle", lambda: "torch sees no CUDA device")
    assert backend() == Backend("reference", "torch sees no CUDA device")
    monkeypatch.setenv("PLORA_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="PLORA_BACKEND=cuda, but torch sees no CUDA device"):
        backend()


def test_with_kernels_they_run_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("PLORA_BACKEND", raising=False)
    monkeypatch.setattr("plora.kernels.dispatch._obstacle", lambda: None)
    assert backend().name == "cuda"
    monkeypatch.setenv("PLORA_BACKEND", "reference")
    assert str(backend()) == "reference (PLORA_BACKEND is set)"


def test_without_kernels_a_gpu_takes_the_grouped_product(monkeypatch):
    monkeypatch.delenv("PLORA_BACKEND", raising=False)
    monkeypatch.setattr("plora.kernels.dispatch._obstacle", lambda: "the extension is not built")
    monkeypatch.setattr("plora.kernels.dispatch._no_grouped_product", lambda: None)
    assert str(backend()) == "grouped (the extension is not built)"
    monkeypatch.setenv("PLORA_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="the extension is not built"):
        backend()


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("PLORA_BACKEND", "triton")
    with pytest.raises(ValueError, match="'triton'"):
        backend()


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_the_obstacle_is_named():
    from plora.kernels.dispatch import _obstacle

    assert _obstacle() == "torch sees no CUDA device"
