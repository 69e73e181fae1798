"""Measured profiles on disk: one JSON file per GPU, model, dtype and torch version, used again by later sweeps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from plora.profiler.memory import MemoryModel, Saved
from plora.profiler.time import StepCost, TimeModel

PROFILE_VERSION = 1


@dataclass(frozen=True)
class ProfileKey:
    """What a profile is valid for.

    Args:
        device: the name its driver gives, or ``cpu``.
        model: the base model's name.
        dtype: compute dtype with quantisation and checkpointing, e.g. ``bf16+nf4+checkpointing``.
        torch: torch's version.
    """

    device: str
    model: str
    dtype: str
    torch: str

    @property
    def filename(self) -> str:
        """A file name that differs where the key does."""
        parts = (self.device, self.model, self.dtype, self.torch)
        return "__".join(re.sub(r"[^A-Za-z0-9.+-]+", "_", part) for part in parts) + ".json"


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Args:
        key: what it is valid for.
        costs: coefficients by tensor-parallel degree.
        memory: corrections of the memory model.
        date: day of the measurement, ISO.
    """

    key: ProfileKey
    costs: Mapping[int, StepCost]
    memory: Saved
    date: str

    def apply(self, memory: MemoryModel, time: TimeModel) -> tuple[MemoryModel, TimeModel]:
        """The models with what was measured in place; degrees that were not keep their estimates."""
        for degree, cost in self.costs.items():
            time = time.measured(degree, cost)
        return replace(memory, calibration=self.memory), replace(time, source=f"measured {self.date}")


def profile_key(device: str, memory: MemoryModel, torch: str) -> ProfileKey:
    """The key of a memory model's settings on a device."""
    parts = [memory.dtype]
    if memory.quantize:
        parts.append(memory.quantize)
    if memory.activation_checkpointing:
        parts.append("checkpointing")
    if memory.compiled:
        parts.append("compiled")
    return ProfileKey(device, memory.spec.name, "+".join(parts), torch)


def save_profile(profile: Profile, directory: str | Path) -> Path:
    """Write a profile and return its file; one for the same key is replaced."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / profile.key.filename
    data = {
        "version": PROFILE_VERSION,
        "key": asdict(profile.key),
        "date": profile.date,
        "memory": asdict(profile.memory),
        "costs": {str(degree): asdict(cost) for degree, cost in sorted(profile.costs.items())},
    }
    # A reader beside us sees the old file or the new one, never half of it.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)
    return path


def load_profile(key: ProfileKey, directory: str | Path) -> Profile | None:
    """The stored profile of a key; None if there is none.

    Raises:
        ValueError: if the file is damaged, naming it.
    """
    path = Path(directory) / key.filename
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        if data["version"] != PROFILE_VERSION:
            return None
        profile = Profile(
            key=ProfileKey(**data["key"]),
            costs={int(degree): StepCost(**cost) for degree, cost in data["costs"].items()},
            memory=Saved(**data["memory"]),
            date=data["date"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the stored profile {path} is damaged ({error}): delete it, and it is measured anew"
        ) from error
    return profile if profile.key == key else None
