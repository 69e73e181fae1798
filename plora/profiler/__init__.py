"""What training costs: memory and time models, from dimensions and data sheets or from measurements."""

from plora.profiler.calibration import CalibrationRound, calibration_rounds
from plora.profiler.fit import MemorySample, RoundSample, fit_memory, fit_time, typical
from plora.profiler.hardware import GPU, GPUS, find_gpu, host_free_bytes
from plora.profiler.memory import MemoryModel, MemoryParts, format_bytes
from plora.profiler.store import (
    Profile,
    ProfileKey,
    fit_profile,
    load_profile,
    profile_folder,
    profile_key,
    save_profile,
)
from plora.profiler.time import StepCost, TimeModel, default_time, estimate, estimate_cpu, one_at_a_time

__all__ = [
    "GPU",
    "GPUS",
    "CalibrationRound",
    "MemoryModel",
    "MemoryParts",
    "MemorySample",
    "Profile",
    "ProfileKey",
    "RoundSample",
    "StepCost",
    "TimeModel",
    "calibration_rounds",
    "default_time",
    "estimate",
    "estimate_cpu",
    "find_gpu",
    "fit_memory",
    "fit_profile",
    "fit_time",
    "format_bytes",
    "host_free_bytes",
    "load_profile",
    "one_at_a_time",
    "profile_folder",
    "profile_key",
    "save_profile",
    "typical",
]
