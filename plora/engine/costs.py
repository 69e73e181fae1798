"""The cost models of the device here: measured where a profile is stored, from data sheets elsewhere."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch

from plora.kernels.dispatch import backend
from plora.profiler import (
    MemoryModel,
    Profile,
    ProfileKey,
    StepCost,
    TimeModel,
    estimate,
    estimate_cpu,
    find_gpu,
    host_free_bytes,
    load_profile,
    profile_folder,
    profile_key,
    save_profile,
)
from plora.profiler.fit import COEFFICIENTS
from plora.profiler.hardware import GPU, GPUS

log = logging.getLogger(__name__)


class CostModels:
    """Memory and time models of one device.

    Args:
        device: which.
        folder: where profiles lie; None for the usual place.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.device = device
        self.folder = folder or profile_folder()
        self._known: dict[ProfileKey, Profile | None] = {}

    @property
    def gpu(self) -> GPU | None:
        """The device's data sheet; None for a CPU, and for a GPU without one."""
        if self.device.type != "cuda":
            return None
        try:
            return find_gpu(self.name)
        except ValueError:
            return None

    @property
    def name(self) -> str:
        """What profiles are stored under: the driver's name of a GPU, a CPU with its threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu, {torch.get_num_threads()} threads"

    def key(self, memory: MemoryModel) -> ProfileKey:
        """Under which a profile for these settings is stored."""
        return profile_key(self.name, memory, torch.__version__, backend().name)

    def profile(self, memory: MemoryModel) -> Profile | None:
        """The stored profile, if there is one that can be read."""
        key = self.key(memory)
        if key not in self._known:
            try:
                self._known[key] = load_profile(key, self.folder)
            except ValueError as error:
                log.warning("%s; planning without it", error)
                self._known[key] = None
        return self._known[key]

    def keep(self, profile: Profile) -> None:
        """Store a profile, and plan with it from now on."""
        self._known[profile.key] = profile
        try:
            save_profile(profile, self.folder)
        except OSError as error:
            log.warning("the profile cannot be stored in %s: %s", self.folder, error)

    def memory(self, plain: MemoryModel) -> MemoryModel:
        """The memory model with measured corrections, where there are any."""
        profile = self.profile(plain)
        return plain if profile is None else profile.apply(plain, self.estimate(plain))[0]

    def time(self, memory: MemoryModel) -> TimeModel:
        """The time model: measured, or carried over from what is measured of the same base trained in another way,
        with recomputation or without, with CUDA graphs or without, or estimated.
        """
        estimated = self.estimate(memory)
        profile = self.profile(memory)
        if profile is not None:
            return profile.apply(memory, estimated)[1]
        others = [
            replace(memory, activation_checkpointing=recompute, graph_tokens=graphs)
            for graphs in dict.fromkeys((memory.graph_tokens, 0, 1))  # a profile is of any graphs, or none
            for recompute in (False, True)
        ]
        other = next((each for each in others if self.profile(each) is not None), memory)
        profile = self.profile(other)
        if profile is None:
            return estimated
        cost = _carried_over(profile.costs[1], self.estimate(other).cost(1), estimated.cost(1))
        return TimeModel(estimated.device, {**estimated.costs, 1: cost}, f"carried over from {profile.date}")

    def estimate(self, memory: MemoryModel) -> TimeModel:
        """The time model before anything was measured."""
        if self.device.type != "cuda":
            return estimate_cpu(memory, torch.get_num_threads())
        gpu = self.gpu
        if gpu is None:
            log.warning("no data sheet of a %s: times are predicted as if it were an A100", self.name)
        return estimate(gpu or GPUS["a100_80gb"], memory)

    def free_bytes(self) -> int:
        """Bytes that are free on the device now."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else host_free_bytes()


def _carried_over(measured: StepCost, estimated: StepCost, wanted: StepCost) -> StepCost:
    """``wanted``, an estimate, off by the same factors as the estimate of what was measured.

    But where CUDA graphs were measured, which show no launch floor, they say nothing of the floor without. What
    estimates take for nothing, or what is no coefficient of a round, is as it was measured.
    """

    def scaled(name: str) -> float:
        found, guess, other = (float(getattr(cost, name)) for cost in (measured, estimated, wanted))
        if name == "floor" and not found:
            return other
        return other * found / guess if guess else other or found

    carried = {name: scaled(name) for name in COEFFICIENTS}
    return replace(measured, **carried, token_step=wanted.token_step, estimated=wanted.estimated)
