"""Measured profiles on disk, used again by later sweeps.

One JSON file per device, model, dtype, torch version and kernel backend. It holds the measurements themselves beside
what was fitted to them, so that a later sweep adds its own and fits again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from plora.profiler.fit import MemorySample, RoundSample, fit_memory, fit_time, typical
from plora.profiler.memory import MemoryModel, Saved
from plora.profiler.time import StepCost, TimeModel

PROFILE_VERSION = 6
# Measurements kept: the newest of each kind.
MOST_ROUNDS = 64
MOST_PEAKS = 32


def profile_folder() -> Path:
    """Where profiles lie: in ``$PLORA_CACHE``, ``~/.cache/plora`` where unset."""
    return Path(os.environ.get("PLORA_CACHE") or "~/.cache/plora").expanduser() / "profiles"


@dataclass(frozen=True)
class ProfileKey:
    """What a profile is valid for.

    Args:
        device: the name its driver gives, or ``cpu``.
        model: the base model's name.
        dtype: compute dtype with what else the layers run with, e.g. ``bf16+nf4+checkpointing28+compiled+graphs``.
        torch: torch's version.
        backend: of the packed products, ``cuda`` or ``reference``.
    """

    device: str
    model: str
    dtype: str
    torch: str
    backend: str = "reference"

    @property
    def filename(self) -> str:
        """A file name that differs where the key does."""
        parts = (self.device, self.model, self.dtype, self.torch, self.backend)
        return "__".join(re.sub(r"[^A-Za-z0-9.+-]+", "_", part) for part in parts) + ".json"


@dataclass(frozen=True)
class Profile:
    """What was measured.

    Args:
        key: what it is valid for.
        costs: coefficients by tensor-parallel degree.
        memory: corrections of the memory model.
        date: day of the measurement, ISO.
        rounds: what the costs of degree 1 were fitted to.
        peaks: what the memory's corrections were fitted to.
        extras: costs measured beside rounds, by their name in ``StepCost``: start-up, evaluation, saving and such.
    """

    key: ProfileKey
    costs: Mapping[int, StepCost]
    memory: Saved
    date: str
    rounds: tuple[RoundSample, ...] = ()
    peaks: tuple[MemorySample, ...] = ()
    extras: Mapping[str, float] = field(default_factory=dict)

    def apply(self, memory: MemoryModel, time: TimeModel) -> tuple[MemoryModel, TimeModel]:
        """The models with what was measured in place; degrees that were not keep their estimates."""
        for degree, cost in self.costs.items():
            time = time.measured(degree, cost)
        if self.peaks:
            memory = replace(memory, calibration=self.memory)
        return memory, replace(time, source=f"measured {self.date}")


def fit_profile(
    key: ProfileKey,
    memory: MemoryModel,
    prior: StepCost,
    rounds: Sequence[RoundSample],
    peaks: Sequence[MemorySample],
    date: str,
    *,
    before: Profile | None = None,
    extras: Mapping[str, float] | None = None,
) -> Profile:
    """A profile of degree 1 from measurements, those of an earlier profile included.

    Args:
        key: what they are valid for.
        memory: the memory model that predicts their peaks.
        prior: the estimate to start from.
        rounds: measured rounds; the newer ones where there are too many.
        peaks: measured peaks.
        date: today, ISO.
        before: the profile so far; its measurements count like the new ones.
        extras: what was measured beside rounds; takes the place of what the profile so far has.

    Raises:
        ValueError: if there are no rounds at all.
    """
    rounds = [*(before.rounds if before else ()), *typical(rounds)][-MOST_ROUNDS:]
    peaks = [*(before.peaks if before else ()), *peaks][-MOST_PEAKS:]
    known: dict[str, Any] = {**(before.extras if before else {}), **(extras or {})}
    cost = replace(fit_time(rounds, prior, graphs=memory.graph_tokens > 0), estimated=False, **known)
    saved = fit_memory(memory, peaks).calibration if peaks else Saved()
    return Profile(key, {1: cost}, saved, date, tuple(rounds), tuple(peaks), known)


def profile_key(device: str, memory: MemoryModel, torch: str, backend: str = "reference") -> ProfileKey:
    """The key of a memory model's settings on a device."""
    parts = [memory.dtype]
    if memory.quantize:
        parts.append(memory.quantize)
    if memory.recomputed_layers:
        parts.append(f"checkpointing{memory.recomputed_layers}")
    if memory.compiled:
        parts.append("compiled")
    if memory.graph_tokens:
        parts.append("graphs")
    if memory.moments != "exact":
        parts.append(memory.moments)
    return ProfileKey(device, memory.spec.name, "+".join(parts), torch, backend)


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
        "rounds": [asdict(sample) for sample in profile.rounds],
        "peaks": [asdict(sample) for sample in profile.peaks],
        "extras": dict(profile.extras),
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
            rounds=tuple(RoundSample(**sample) for sample in data["rounds"]),
            peaks=tuple(MemorySample(**sample) for sample in data["peaks"]),
            extras=dict(data["extras"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the stored profile {path} is damaged ({error}): delete it, and it is measured anew"
        ) from error
    return profile if profile.key == key else None
