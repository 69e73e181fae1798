"""Which trials train together, when they join and what that should cost: on the device here, or on others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from plora.config.schema import SweepConfig
from plora.data.types import Task
from plora.engine.costs import CostModels
from plora.models import ModelSpec
from plora.planner import Load, Plan, PlannedJob, Problem, check_plan, load_trials, make_problem, plan_on, retimed
from plora.planner.costs import ROWS_AT_A_TIME
from plora.planner.preview import counted
from plora.planner.problem import DoesNotFitError
from plora.profiler import MemoryModel, StepCost, find_gpu, format_bytes
from plora.search.trial import DEFAULT_TRIAL, Trial
from plora.training.graphs import graph_tokens
from plora.training.live import evaluation_steps
from plora.training.loss import can_compile, chunk_rows
from plora.training.scorers import LABEL_ACCURACY

log = logging.getLogger(__name__)

# Packed generation is planned with room for this many rows at full length.
_GENERATION_ROWS = 32
# A plan for many devices is worth more search than one for the device here. Both are defaults of packing.time_limit.
_SEARCH_SECONDS = 10.0
_SEARCH_SECONDS_ELSEWHERE = 20.0


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep is going to do.

    Args:
        problem: the trials, limits and cost models that it was planned with.
        plan: the jobs.
        free_bytes: bytes free on the device before anything was loaded.
    """

    problem: Problem
    plan: Plan
    free_bytes: int

    @property
    def memory(self) -> MemoryModel:
        """The memory model; it says whether activations are recomputed."""
        return self.problem.memory

    @property
    def cost(self) -> StepCost:
        """The time model of one device."""
        return self.problem.time.cost(1)

    def sizes(self, job: PlannedJob) -> dict[str, int]:
        """Bytes of each of a job's adapters."""
        loads = {load.name: load for load in self.problem.loads}
        return {t.name: self.memory.adapter_bytes(t.rank, loads[t.name].target_modules) for t in job.trials}

    def fullest(self, job: PlannedJob) -> list[str]:
        """The trials whose adapters are alive when a job's take most memory."""
        sizes = self.sizes(job)
        rounds = sorted({trial.start_round for trial in job.trials})
        alive = [[t.name for t in job.trials if t.start_round <= mark < t.end_round] for mark in rounds]
        return max(alive, key=lambda names: sum(sizes[name] for name in names))

    def groups(self, job: PlannedJob) -> list[list[str]]:
        """A job's trials in groups that fit the device together, now that they all have ended."""
        sizes = self.sizes(job)
        most = sum(sizes[name] for name in self.fullest(job))
        groups: list[list[str]] = []
        for name, size in sizes.items():
            if groups and sum(sizes[other] for other in groups[-1]) + size <= most:
                groups[-1].append(name)
            else:
                groups.append([name])
        return groups


def plan_sweep(
    config: SweepConfig,
    spec: ModelSpec,
    tasks: Mapping[str, Task],
    models: CostModels,
    *,
    free: int | None = None,
    is_loaded: bool = False,
) -> SweepPlan:
    """The plan for the device here: the one given (``plan:``), or the best found.

    Args:
        config: the sweep's.
        spec: the base model's shape.
        tasks: the data of each trial, by its name.
        models: the device's cost models.
        free: bytes free on it before the base was loaded; None for those free now.
        is_loaded: whether the base is loaded and compiled already.

    Raises:
        ValueError: with the numbers, if a trial does not fit even alone; with every mismatch, if a given plan does not
            fit this sweep.
    """
    free = models.free_bytes() if free is None else free
    options: dict[str, Any] = limits(config, tasks) | {
        "time": models.time,
        "free_bytes": int(free * config.packing.memory_fraction),
        "is_loaded": is_loaded,
    }
    loads = loads_of(config, spec, tasks)
    if config.plan is not None:
        return _given(config, spec, loads, models, options, free)
    choices = [models.memory(memory) for memory in memory_models(config, spec, models.device)]
    solver, seconds = config.packing.solver.lower(), config.packing.time_limit or _SEARCH_SECONDS
    with _all_of(free, config.packing.memory_fraction):
        problem, plan = plan_on(loads, choices, models.gpu, 1, solver=solver, time_limit=seconds, **options)
    return SweepPlan(problem, plan, free)


def plan_elsewhere(config: SweepConfig, spec: ModelSpec, tasks: Mapping[str, Task]) -> Plan:
    """The plan for ``config.hardware``, from its data sheet.

    Raises:
        ValueError: as `plan_sweep`.
    """
    assert config.hardware is not None
    gpu, count = find_gpu(config.hardware.gpu), config.hardware.count
    choices = [replace(memory, compiled=True) for memory in memory_models(config, spec, torch.device("cuda"))]
    options = limits(config, tasks) | {"free_bytes": int(gpu.free_bytes * config.packing.memory_fraction)}
    loads = loads_of(config, spec, tasks)
    solver, seconds = config.packing.solver.lower(), config.packing.time_limit or _SEARCH_SECONDS_ELSEWHERE
    with _all_of(gpu.free_bytes, config.packing.memory_fraction):
        return plan_on(loads, choices, gpu, count, solver=solver, time_limit=seconds, **options)[1]


@contextmanager
def _all_of(free: int, fraction: float) -> Iterator[None]:
    """Say so where a trial that does not fit would, if all that is free were used."""
    try:
        yield
    except DoesNotFitError as error:
        if error.need > free:
            raise
        whole = f"Of {format_bytes(free)}, a plan may use packing.memory_fraction = {fraction:g}: raised, it fits."
        raise DoesNotFitError(f"{error} {whole}", error.need) from error


def _given(
    config: SweepConfig, spec: ModelSpec, loads: list[Load], models: CostModels, options: dict[str, Any], free: int
) -> SweepPlan:
    assert config.plan is not None
    plan = Plan.load(config.plan)
    memory = memory_models(config, spec, models.device)[0]
    try:
        if config.model.activation_checkpointing == "auto":
            memory = replace(memory, activation_checkpointing=plan.recomputed_layers)
        memory = replace(memory, graph_tokens=min(memory.graph_tokens, plan.graph_tokens))
        problem = make_problem(loads, models.memory(memory), models.gpu, 1, **options)
        check_plan(plan, problem)
    except ValueError as error:
        raise ValueError(f"plan = '{config.plan}': {error}") from error
    return SweepPlan(problem, retimed(problem, plan), free)


def loads_of(config: SweepConfig, spec: ModelSpec, tasks: Mapping[str, Task]) -> list[Load]:
    """The trials as the planner sees them, with what they are evaluated on."""
    labels: dict[int, int] = {}

    def labels_of(trial: Trial) -> int:
        task = tasks[trial.name]
        if id(task) not in labels:
            labels[id(task)] = sum(example.n_labels for example in task.train)
        return labels[id(task)]

    def evaluations(trial: Trial, every: float | None) -> int:
        return len(evaluation_steps(trial.total_steps(len(tasks[trial.name].train)), every))

    def eval_tokens(trial: Trial) -> int:
        task = tasks[trial.name]
        tokens = sum(len(example) for example in task.val)
        times = evaluations(trial, config.evaluation.every)
        if config.objective.metric == LABEL_ACCURACY:
            times += max((len(example.fields.get("label_words", ())) for example in task.val), default=0)
        return times * tokens

    def generated(trial: Trial) -> int:
        generation = config.evaluation.generation
        if generation is None or generation.every is None:
            return 0
        rows = _answered(config, len(tasks[trial.name].val))
        return round(evaluations(trial, generation.every) * rows * _answer_tokens(tasks[trial.name]))

    return load_trials(
        config.trials,
        spec,
        lambda trial: [len(example) for example in tasks[trial.name].train],
        eval_tokens=eval_tokens,
        generated_tokens=generated,
        labels=labels_of,
    )


def base_seconds(tasks: Mapping[str, Task], cost: StepCost) -> float:
    """Predicted seconds of evaluating the base once per data set, the first evaluation of a job included."""
    distinct = {id(task): task for task in tasks.values()}.values()
    return cost.eval_start + sum(
        cost.eval_seconds(sum(map(len, task.val)), sum(example.n_labels for example in task.val)) for task in distinct
    )


def scoring_seconds(config: SweepConfig, tasks: Mapping[str, Task], cost: StepCost) -> float:
    """Predicted seconds of what follows the training: answers on validation data, and scores on test data.

    An adapter is taken to answer at the length of its data set's answers, the base at the longest allowed.
    """
    task = tasks[DEFAULT_TRIAL] if DEFAULT_TRIAL in tasks else next(iter(tasks.values()))
    test_tokens, test_labels = sum(map(len, task.test)), sum(example.n_labels for example in task.test)
    generation = config.evaluation.generation
    if not config.objective.needs_answers or generation is None:
        return cost.eval_start + 3 * cost.eval_seconds(test_tokens, test_labels)
    chosen = len(config.trials) if generation.top_k is None else min(generation.top_k + 1, len(config.trials))
    rows, most = _answered(config, len(task.val)), generation.max_new_tokens
    usual = min(_answer_tokens(task), most)
    return sum(
        cost.generation_seconds(count * n, tokens, ROWS_AT_A_TIME)
        for count, n, tokens in (
            (chosen, rows, usual), (1, rows, most), (2, len(task.test), usual), (1, len(task.test), most),
        )
    )  # fmt: skip


def limits(config: SweepConfig, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """What every planner is told of ``packing:`` and of generation."""
    tokens = config.packing.tokens_per_microbatch
    return {
        "token_budget": None if isinstance(tokens, str) else tokens,
        "max_adapters": config.packing.max_adapters,
        "generation": _generation_size(config, tasks),
    }


def memory_models(config: SweepConfig, spec: ModelSpec, device: torch.device) -> list[MemoryModel]:
    """The memory models of the sweep's base on ``device`` to choose among: without recomputation and with it, with
    CUDA graphs, which take memory, and without.
    """
    wanted = config.model.activation_checkpointing
    plain = MemoryModel(
        spec,
        dtype=config.model.compute_dtype,
        activation_checkpointing=False if wanted == "auto" else wanted,  # type: ignore[arg-type]
        device=device.type,
        quantize=config.model.quantize,
        moments=config.packing.optimizer_state,
        loss_chunk=chunk_rows(spec.vocab_size, device),
        compiled=can_compile(device),
        graph_tokens=graph_tokens(spec, device, config.model.compute_dtype) if config.packing.cuda_graphs else 0,
    )
    graphs = [plain, replace(plain, graph_tokens=0)] if plain.graph_tokens else [plain]
    recomputing = [replace(each, activation_checkpointing=True) for each in graphs] if wanted == "auto" else []
    return graphs + recomputing


def log_plan(planned: SweepPlan) -> None:
    """Say which jobs there are, and what each should need."""
    plan, memory = planned.plan, planned.memory
    n_trials = sum(len(job.trials) for job in plan.jobs)
    recomputed = memory.recomputed_layers
    recompute = f", {recomputed} layers recomputed" if recomputed else ""
    log.info(
        "%s in %s on %s%s; times %s",
        counted(n_trials, "trial"), counted(len(plan.jobs), "job"), plan.device, recompute, planned.problem.time.source,
    )  # fmt: skip
    for job in plan.jobs:
        log.info(
            "job %d: %s, up to %d tokens a microbatch, %s of %s free",
            job.number, counted(len(job.trials), "trial"), job.token_budget, format_bytes(job.memory_bytes),
            format_bytes(planned.free_bytes),
        )  # fmt: skip


def _generation_size(config: SweepConfig, tasks: Mapping[str, Task]) -> tuple[int, int]:
    """Rows and length of packed generation; ``(0, 0)`` where none is asked for."""
    generation = config.evaluation.generation
    if generation is None:
        return 0, 0
    prompts = [len(example.prompt) for task in tasks.values() for example in (*task.val, *task.test)]
    return _GENERATION_ROWS, max(prompts) + generation.max_new_tokens


def _answered(config: SweepConfig, n_examples: int) -> int:
    generation = config.evaluation.generation
    most = None if generation is None else generation.max_examples
    return n_examples if most is None else min(most, n_examples)


def _answer_tokens(task: Task) -> float:
    """Tokens of an answer, on average."""
    examples = task.val or task.train
    return float(np.mean([example.n_labels for example in examples]))
