"""Which trials train together under the device's free memory, and what that should cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from plora.checkpoint.atomic import atomic_file
from plora.config.schema import SweepConfig
from plora.data.types import Task
from plora.models import ModelSpec
from plora.planner import Load, Packing, choose_checkpointing, load_trials, pack_trials
from plora.profiler import MemoryModel, TimeModel, estimate, find_gpu, format_bytes, host_free_bytes
from plora.profiler.time import default_time
from plora.training.loss import can_compile, chunk_rows

log = logging.getLogger(__name__)

# Packed generation is planned with room for this many rows at full length.
_GENERATION_ROWS = 32


@dataclass(frozen=True)
class SweepPlan:
    """The packs of a sweep.

    Args:
        device: where they run, one after another.
        memory: the memory model they were made with; it says whether activations are recomputed.
        packing: the packs.
        free_bytes: bytes free on the device before anything was loaded.
    """

    device: torch.device
    memory: MemoryModel
    packing: Packing
    free_bytes: int

    @property
    def seconds(self) -> float:
        """Predicted time of all packs, start-up left out."""
        return sum(pack.seconds for pack in self.packing.packs)


def make_plan(config: SweepConfig, spec: ModelSpec, tasks: Mapping[str, Task], device: torch.device) -> SweepPlan:
    """Pack the trials.

    Args:
        config: the sweep's.
        spec: the base model's shape.
        tasks: the data of each trial, by its name.
        device: where to train.

    Raises:
        ValueError: with the numbers, if a trial does not fit even alone.
    """
    loads, memory, packing = loads_of(config, spec, tasks), memory_model(config, spec, device), config.packing
    options = limits(config, tasks) | {"solver": packing.solver.lower(), "time_limit": packing.time_limit}
    free = free_bytes(device)
    usable = int(free * packing.memory_fraction)
    time = time_models(device)
    if config.model.activation_checkpointing == "auto":
        return SweepPlan(device, *choose_checkpointing(loads, memory, usable, time=time, **options), free)
    return SweepPlan(device, memory, pack_trials(loads, memory, usable, time=time(memory), **options), free)


def loads_of(config: SweepConfig, spec: ModelSpec, tasks: Mapping[str, Task]) -> list[Load]:
    """The trials as the planner sees them."""
    return load_trials(config.trials, spec, lambda trial: [len(example) for example in tasks[trial.name].train])


def limits(config: SweepConfig, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """What every planner is told of ``packing:`` and of generation."""
    tokens = config.packing.tokens_per_microbatch
    return {
        "token_budget": None if isinstance(tokens, str) else tokens,
        "max_adapters": config.packing.max_adapters,
        "generation": _generation_size(config, tasks),
    }


def memory_model(config: SweepConfig, spec: ModelSpec, device: torch.device) -> MemoryModel:
    """The memory model of the sweep's base on ``device``."""
    return MemoryModel(
        spec,
        dtype=config.model.compute_dtype,
        activation_checkpointing=config.model.activation_checkpointing is True,
        device=device.type,
        quantize=config.model.quantize,
        loss_chunk=chunk_rows(spec.vocab_size, device),
        compiled=can_compile(device),
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on ``device`` now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_free_bytes()


def write_plan(path: Path, plan: SweepPlan) -> None:
    """Write ``plan.json``."""
    packs = [asdict(pack) | {"total_bytes": pack.memory.total} for pack in plan.packing.packs]
    content = {"version": 1, "free_bytes": plan.free_bytes, "method": plan.packing.method, "packs": packs}
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def log_plan(plan: SweepPlan) -> None:
    """Say which packs there are, and what each should need."""
    packs = plan.packing.packs
    recompute = ", activations recomputed" if plan.memory.activation_checkpointing else ""
    n_trials, plural = sum(len(pack.trials) for pack in packs), "s" * (len(packs) > 1)
    log.info("%d trials in %d pack%s on %s%s", n_trials, len(packs), plural, plan.device, recompute)
    for number, pack in enumerate(packs, start=1):
        log.info(
            "pack %d: %d trials, up to %d tokens a microbatch, %s of %s free: %s",
            number, len(pack.trials), pack.tokens, format_bytes(pack.memory.total), format_bytes(plan.free_bytes),
            pack.memory.describe(),
        )  # fmt: skip


def time_models(device: torch.device) -> Callable[[MemoryModel], TimeModel]:
    """From a memory model to the time model of ``device``, from its data sheet where there is one."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        try:
            gpu = find_gpu(name)
        except ValueError:
            log.warning("no data sheet of a %s: times are predicted as if it were another GPU", name)
        else:
            return partial(estimate, gpu)
    return default_time


def _generation_size(config: SweepConfig, tasks: Mapping[str, Task]) -> tuple[int, int]:
    """Rows and length of packed generation; ``(0, 0)`` where none is asked for."""
    generation = config.evaluation.generation
    if generation is None:
        return 0, 0
    prompts = [len(example.prompt) for task in tasks.values() for example in (*task.val, *task.test)]
    return _GENERATION_ROWS, max(prompts) + generation.max_new_tokens
