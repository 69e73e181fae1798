"""What a sweep would do, on the devices here or on others, shown before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from rich.console import Console

from plora.checkpoint.atomic import write_text
from plora.checkpoint.layout import SweepLayout
from plora.config.schema import SweepConfig
from plora.data.types import Task
from plora.engine.planning import free_bytes, limits, loads_of, memory_model, time_models
from plora.models import ModelSpec
from plora.planner import Plan, plan_on
from plora.planner.preview import render, to_html
from plora.profiler import GPU, MemoryModel, TimeModel, find_gpu

log = logging.getLogger(__name__)

_FILE_WIDTH = 120
# A plan for many devices is worth more search than the packs of one.
_TIME_LIMIT = 20.0


def preview(config: SweepConfig, spec: ModelSpec, tasks: Mapping[str, Task], device: torch.device) -> Plan:
    """The plan for ``config.hardware``, or for the one device here.

    Args:
        config: the sweep's.
        spec: the base model's shape.
        tasks: the data of each trial, by its name.
        device: what is here.

    Raises:
        ValueError: with the numbers, if a trial does not fit even alone.
    """
    gpu: GPU | None = None
    time: Callable[[MemoryModel], TimeModel] | None = time_models(device)
    memory, count, free = memory_model(config, spec, device), 1, free_bytes(device)
    if config.hardware is not None:
        gpu, count = find_gpu(config.hardware.gpu), config.hardware.count
        memory = replace(memory_model(config, spec, torch.device("cuda")), compiled=True)
        free, time = gpu.free_bytes, None
    elif device.type == "cuda":
        gpu = find_gpu(time_models(device)(memory).device)
    choices = [memory]
    if config.model.activation_checkpointing == "auto":
        choices.append(replace(memory, activation_checkpointing=True))
    _, plan = plan_on(
        loads_of(config, spec, tasks),
        choices,
        gpu,
        count,
        time=time,
        free_bytes=int(free * config.packing.memory_fraction),
        solver=config.packing.solver.lower(),
        time_limit=_TIME_LIMIT,
        **limits(config, tasks),
    )
    return plan


def show_preview(plan: Plan, layout: SweepLayout) -> None:
    """Print the plan, and write its page."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(render(plan, console.width))
    write_text(layout.plan_page, to_html(plan))
    log.info("the plan as a page: %s", layout.plan_page)
