"""Where predicted times and memory come from."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plora.engine.costs import CostModels
from plora.engine.planning import SweepPlan
from plora.models.spec import ModelSpec
from plora.planner import Load, Plan, PlannedJob, PlannedTrial, make_problem
from plora.profiler import MemoryModel, MemorySample, Profile, RoundSample, estimate_cpu, fit_profile

MEMORY = MemoryModel(ModelSpec.preset("Qwen/Qwen2.5-7B-Instruct"), device="cuda")
ON_CPU = MemoryModel(ModelSpec.preset("HuggingFaceTB/SmolLM2-135M"), dtype="fp32", device="cpu")
ROUNDS = [RoundSample(tokens, 8 * tokens, 1, 1e6, 1, 2e-3 * tokens + 0.9) for tokens in (64, 256, 1024)]


def profile(models: CostModels, memory: MemoryModel, peak: int) -> Profile:
    """As a calibration would make it, twice as slow as estimated."""
    cost = models.estimate(memory).cost(1)
    rounds = [replace(each, seconds=2 * each.predicted(cost)) for each in ROUNDS]
    peaks = [MemorySample(0, 8, 1024, peak)]
    return fit_profile(models.key(memory), memory, cost, rounds, peaks, "2026-11-22")


@pytest.mark.parametrize(("name", "device"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA Unheard-of 9", "a100_80gb")])
def test_times_of_a_gpu_come_from_its_data_sheet(
    name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    with caplog.at_level(logging.WARNING):
        assert CostModels(torch.device("cuda"), tmp_path).time(MEMORY).device == device
    assert (name in caplog.text) == (device != "h100")


def test_a_stored_profile_replaces_the_estimate(tmp_path: Path) -> None:
    models = CostModels(torch.device("cpu"), tmp_path)
    estimated = models.time(ON_CPU)
    assert (estimated.device, estimated.estimated) == ("cpu", True)
    parts = ON_CPU.parts_from_bytes(0, 1024, 8)
    models.keep(profile(models, ON_CPU, parts.allocated + parts.activations // 2))
    for known in (models, CostModels(torch.device("cpu"), tmp_path)):
        measured = known.time(ON_CPU)
        assert measured.source == "measured 2026-11-22"
        assert measured.cost(1).per_token == pytest.approx(2 * estimated.cost(1).per_token)
        assert known.memory(ON_CPU).calibration.activations == pytest.approx(1.5, rel=0.05)
    # Other settings have a profile of their own.
    assert models.profile(replace(ON_CPU, dtype="bf16")) is None


def test_what_is_measured_without_recomputation_corrects_the_estimate_with_it(tmp_path: Path) -> None:
    models = CostModels(torch.device("cpu"), tmp_path)
    recomputing = replace(ON_CPU, activation_checkpointing=True)
    estimated = models.time(recomputing).cost(1)
    models.keep(profile(models, ON_CPU, 1 << 30))
    carried = models.time(recomputing)
    assert carried.cost(1).per_token == pytest.approx(2 * estimated.per_token)
    assert carried.estimated
    assert models.memory(recomputing) == recomputing


def test_a_cost_that_estimates_take_for_nothing_is_carried_over_too(tmp_path: Path) -> None:
    models, recomputing = CostModels(torch.device("cpu"), tmp_path), replace(ON_CPU, activation_checkpointing=True)
    measured = profile(models, ON_CPU, 1 << 30)
    models.keep(replace(measured, costs={1: replace(measured.costs[1], per_sequence=0.02)}))
    assert models.estimate(recomputing).cost(1).per_sequence == 0
    assert models.time(recomputing).cost(1).per_sequence == 0.02


def test_graphs_that_were_measured_say_nothing_of_the_launch_floor_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    models, with_graphs = CostModels(torch.device("cuda"), tmp_path), replace(MEMORY, graph_tokens=1000)
    measured = profile(models, with_graphs, 1 << 30)
    assert measured.costs[1].floor == 0.0
    models.keep(measured)
    carried = models.time(MEMORY)
    assert carried.source.startswith("carried over")
    assert carried.cost(1).floor == models.estimate(MEMORY).cost(1).floor > 0


def test_a_damaged_profile_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = CostModels(torch.device("cpu"), tmp_path)
    models.keep(profile(models, ON_CPU, 1 << 30))
    next(tmp_path.iterdir()).write_text("{")
    assert CostModels(torch.device("cpu"), tmp_path).profile(ON_CPU) is None
    assert "is damaged" in caplog.text


def test_the_fullest_moment_of_a_job_and_groups_that_fit_are_found() -> None:
    loads = [Load("a", 8, 10, 100.0, 50), Load("b", 32, 5, 100.0, 50), Load("c", 16, 5, 100.0, 50, ("q_proj",))]
    trials = [
        PlannedTrial("a", 8, 0, 10, 100.0),
        PlannedTrial("b", 32, 0, 5, 100.0),
        PlannedTrial("c", 16, 5, 5, 100.0),
    ]
    job = PlannedJob(0, (0,), 128, tuple(trials), 0.0, 1.0, 0.1, 1, 1)
    problem = make_problem(loads, ON_CPU, None, 1, time=lambda memory: estimate_cpu(memory, 1), free_bytes=8 << 30)
    planned = SweepPlan(problem, Plan("m", "fp32", 0, "cpu", 1, 1, "makespan", "", True, 1.0, 1.0, "work", (job,)), 1)
    assert planned.fullest(job) == ["a", "b"]
    assert planned.sizes(job)["c"] == ON_CPU.adapter_bytes(16, ("q_proj",)) < planned.sizes(job)["b"]
    groups = planned.groups(job)
    assert [name for group in groups for name in group] == ["a", "b", "c"]
    assert groups == [["a", "b"], ["c"]]
