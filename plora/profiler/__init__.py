"""What training costs: memory and time models, from dimensions and data sheets or from measurements."""

from plora.profiler.fit import MemorySample, RoundSample, fit_memory, fit_time
from plora.profiler.hardware import GPU, GPUS, find_gpu, host_free_bytes
from plora.profiler.memory import MemoryModel, MemoryParts, format_bytes
from plora.profiler.store import Profile, ProfileKey, load_profile, profile_key, save_profile
from plora.profiler.time import StepCost, TimeModel, default_time, estimate, estimate_cpu, one_at_a_time

__all__ = [
    "GPU",
    "GPUS",
    "MemoryModel",
    "MemoryParts",
    "MemorySample",
    "Profile",
    "ProfileKey",
    "RoundSample",
    "StepCost",
    "TimeModel",
    "default_time",
    "estimate",
    "estimate_cpu",
    "find_gpu",
    "fit_memory",
    "fit_time",
    "format_bytes",
    "host_free_bytes",
    "load_profile",
    "one_at_a_time",
    "profile_key",
    "save_profile",
]
