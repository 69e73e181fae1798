"""Whether a plan, perhaps read from a file, can be carried out: every mismatch in one list."""

from __future__ import annotations

import itertools

from plora.planner.plan import Plan, PlannedJob
from plora.planner.problem import Problem, legal_degrees
from plora.profiler.memory import format_bytes


def check_plan(plan: Plan, problem: Problem) -> None:
    """Refuse a plan that does not match the problem: trials, devices, degrees, times or memory.

    Raises:
        ValueError: with every mismatch in one list.
    """
    mistakes = _setting_mistakes(plan, problem) + _trial_mistakes(plan, problem)
    for job in plan.jobs:
        mistakes += _job_mistakes(job, problem)
    mistakes += _overlaps(plan)
    if mistakes:
        text = "\n  ".join(mistakes)
        ways = "one way" if len(mistakes) == 1 else f"{len(mistakes)} ways"
        raise ValueError(f"the plan does not match this sweep in {ways}; plan again or change:\n  {text}")


def _setting_mistakes(plan: Plan, problem: Problem) -> list[str]:
    mistakes, memory = [], problem.memory
    if plan.model != memory.spec.name:
        mistakes.append(f"it is for the model {plan.model}, not {memory.spec.name}")
    if plan.n_devices > problem.n_devices:
        mistakes.append(f"it is for {plan.n_devices} devices ({plan.device}), there are {problem.n_devices}")
    dtype = memory.quantize or memory.dtype
    if plan.dtype != dtype:
        mistakes.append(f"it is for a base in {plan.dtype}, model.dtype is {dtype}")
    if plan.recomputed_layers != memory.recomputed_layers:
        mistakes.append(
            f"it has {plan.recomputed_layers} layers recomputed, model.activation_checkpointing asks for "
            f"{memory.recomputed_layers}"
        )
    if plan.graph_tokens > memory.graph_tokens:
        mistakes.append(
            f"it runs microbatches of up to {plan.graph_tokens} tokens as CUDA graphs, here those of up to "
            f"{memory.graph_tokens} can (packing.cuda_graphs, and the CUDA kernels)"
        )
    return mistakes


def _trial_mistakes(plan: Plan, problem: Problem) -> list[str]:
    loads = {load.name: load for load in problem.loads}
    seen: dict[str, int] = {}
    mistakes = []
    for job in plan.jobs:
        for trial in job.trials:
            if trial.name in seen:
                twice = seen[trial.name] == job.number
                where = f"twice in job {job.number}" if twice else f"in job {seen[trial.name]} and in job {job.number}"
                mistakes.append(f"trial {trial.name} is {where}: keep one")
            seen[trial.name] = job.number
            load = loads.get(trial.name)
            if load is None:
                mistakes.append(f"trial {trial.name} in job {job.number} is not in the sweep")
            elif (trial.rank, trial.steps) != (load.rank, load.steps):
                mistakes.append(
                    f"trial {trial.name} has rank {load.rank} and {load.steps} steps, the plan says "
                    f"rank {trial.rank} and {trial.steps} steps"
                )
    missing = [name for name in loads if name not in seen]
    if missing:
        mistakes.append(f"trials in no job: {', '.join(missing)}")
    return mistakes


def _job_mistakes(job: PlannedJob, problem: Problem) -> list[str]:
    spec, mistakes = problem.memory.spec, []
    if not job.trials:
        return [f"job {job.number} has no trials"]
    outside = [device for device in job.devices if not 0 <= device < problem.n_devices]
    if sorted(job.devices) != list(range(min(job.devices, default=0), min(job.devices, default=0) + len(job.devices))):
        mistakes.append(f"job {job.number} is on devices {list(job.devices)}: they must be neighbours, each once")
    elif outside or not job.devices:
        there = "there is only 0" if problem.n_devices == 1 else f"there are 0 to {problem.n_devices - 1}"
        mistakes.append(f"job {job.number} is on devices {list(job.devices)}, {there}")
    if job.degree not in legal_degrees(spec, max(1, job.degree)) or job.degree not in problem.degrees:
        mistakes.append(
            f"job {job.number} has tensor-parallel degree {job.degree}, allowed are "
            f"{', '.join(map(str, problem.degrees))}"
        )
        return mistakes
    loads = {load.name: load for load in problem.loads}
    if any(trial.name not in loads for trial in job.trials):
        return mistakes
    longest = max(loads[trial.name].longest for trial in job.trials)
    if job.token_budget < longest:
        mistakes.append(
            f"job {job.number} has microbatches of {job.token_budget} tokens, its longest sequence {longest}"
        )
    if problem.token_budget is not None and job.token_budget > problem.token_budget:
        mistakes.append(
            f"job {job.number} has microbatches of {job.token_budget} tokens, packing.tokens_per_microbatch is "
            f"{problem.token_budget}"
        )
    return mistakes + _start_mistakes(job) + _memory_mistakes(job, problem)


def _start_mistakes(job: PlannedJob) -> list[str]:
    """Trials that would not join when the plan says: they join as soon as those before them have ended."""
    mistakes = []
    for trial in job.trials:
        before = [other.end_round for other in job.trials if other.end_round <= trial.start_round]
        joins = max(before, default=0)
        if joins != trial.start_round:
            when = f"round {joins}, when those before it have ended" if before else "round 0, with nothing before it"
            mistakes.append(
                f"trial {trial.name} starts in round {trial.start_round} of job {job.number}, but would join in "
                f"{when}: set its start_round to {joins}"
            )
    return mistakes


def _memory_mistakes(job: PlannedJob, problem: Problem) -> list[str]:
    loads = {load.name: load for load in problem.loads}
    mistakes = []
    memory = problem.memory
    marks = {trial.start_round for trial in job.trials}
    alive = [[t for t in job.trials if t.start_round <= mark < t.end_round] for mark in marks]
    peak = max(
        sum(memory.adapter_bytes(t.rank, loads[t.name].target_modules, job.degree) for t in live) for live in alive
    )
    need = memory.parts_from_bytes(
        peak, job.token_budget, max(t.rank for t in job.trials), degree=job.degree, generation=problem.generation
    ).total
    if need > problem.free_bytes:
        mistakes.append(
            f"job {job.number} needs {format_bytes(need)} on each device, {format_bytes(problem.free_bytes)} are free: "
            "lower its token_budget, or let fewer of its trials train at a time"
        )
    if problem.max_adapters is not None and max(map(len, alive)) > problem.max_adapters:
        mistakes.append(
            f"job {job.number} has {max(map(len, alive))} adapters alive at a time, max_adapters is "
            f"{problem.max_adapters}"
        )
    return mistakes


def _overlaps(plan: Plan) -> list[str]:
    mistakes = []
    by_device: dict[int, list[PlannedJob]] = {}
    for job in plan.jobs:
        for device in set(job.devices):
            by_device.setdefault(device, []).append(job)
    for device, jobs in sorted(by_device.items()):
        jobs.sort(key=lambda job: job.start)
        for before, after in itertools.pairwise(jobs):
            if after.start < before.end - 1e-6 * max(1.0, before.end):
                mistakes.append(
                    f"device {device} is in job {before.number} and job {after.number} at the same time: job "
                    f"{after.number} starts at {after.start:.1f} s, job {before.number} ends at {before.end:.1f} s"
                )
    return mistakes
