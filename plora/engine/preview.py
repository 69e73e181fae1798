"""What a sweep would do, on the devices here or on others, shown before anything is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from plora.checkpoint.atomic import write_text
from plora.checkpoint.layout import SweepLayout
from plora.config.schema import SweepConfig
from plora.data.types import Task
from plora.engine.planning import free_bytes, limits, loads_of, memory_model, time_models
from plora.models import ModelSpec
from plora.planner import Load, Plan, Problem, make_plan, plan_on
from plora.planner.preview import render, to_html
from plora.profiler import find_gpu
from plora.profiler.time import one_at_a_time

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
    loads, options = loads_of(config, spec, tasks), limits(config, tasks)
    solver = config.packing.solver.lower()
    if config.hardware is not None:
        return _elsewhere(config, spec, loads, solver, options)
    memory = memory_model(config, spec, device)
    usable = int(free_bytes(device) * config.packing.memory_fraction)
    problem = Problem(tuple(loads), memory, time_models(device)(memory), usable, **options)
    gpu = None if device.type == "cpu" else find_gpu(problem.time.device)
    peft = one_at_a_time(problem.time, memory, gpu)
    return make_plan(problem, solver=solver, time_limit=_TIME_LIMIT, peft=peft)


def show_preview(plan: Plan, layout: SweepLayout) -> None:
    """Print the plan, and write its page."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(render(plan, console.width))
    write_text(layout.plan_page, to_html(plan))
    log.info("the plan as a page: %s", layout.plan_page)


def _elsewhere(
    config: SweepConfig, spec: ModelSpec, loads: list[Load], solver: str, options: Mapping[str, Any]
) -> Plan:
    assert config.hardware is not None
    gpu = find_gpu(config.hardware.gpu)
    memory = replace(memory_model(config, spec, torch.device("cuda")), compiled=True)
    choices = [memory]
    if config.model.activation_checkpointing == "auto":
        choices.append(replace(memory, activation_checkpointing=True))
    usable = int(gpu.free_bytes * config.packing.memory_fraction)
    _, plan = plan_on(
        loads, choices, gpu, config.hardware.count, free_bytes=usable, solver=solver, time_limit=_TIME_LIMIT, **options
    )
    return plan
