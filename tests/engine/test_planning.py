"""Where predicted times come from."""

from __future__ import annotations

import logging

import pytest
import torch

from plora.engine.planning import time_models
from plora.models.spec import ModelSpec
from plora.profiler import MemoryModel


@pytest.mark.parametrize(("name", "device"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA Unheard-of 9", "a100_80gb")])
def test_times_of_a_gpu_come_from_its_data_sheet(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    memory = MemoryModel(ModelSpec.preset("Qwen/Qwen2.5-7B-Instruct"), device="cuda")
    with caplog.at_level(logging.WARNING):
        assert time_models(torch.device("cuda"))(memory).device == device
    assert (name in caplog.text) == (device != "h100")


def test_times_of_a_cpu() -> None:
    memory = MemoryModel(ModelSpec.preset("Qwen/Qwen2.5-7B-Instruct"), device="cpu")
    assert time_models(torch.device("cpu"))(memory).device == "cpu"
