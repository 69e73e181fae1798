"""Carrying out a plan on paper: jobs and rounds one after another against the cost model, with noise and early stops.

The simulator follows the same rules as a run: a job starts when the jobs planned before it on its devices have ended,
and a waiting trial joins by :meth:`plora.planner.plan.PlannedJob.ready`. Clock times in the plan are predictions only.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from plora.planner.costs import Costs, make_costs
from plora.planner.plan import Plan, PlannedJob
from plora.planner.problem import Problem


@dataclass(frozen=True)
class JobRun:
    """What became of a job: seconds of start and end, and of each trial's; adapters' bytes at their peak."""

    number: int
    start: float
    end: float
    trial_starts: Mapping[str, float]
    trial_ends: Mapping[str, float]
    peak_bytes: int


@dataclass(frozen=True)
class Simulation:
    """An executed plan.

    Args:
        makespan: seconds from the first start to the last end.
        jobs: in the plan's order.
        busy: part of all device-seconds until the makespan in which a job ran.
    """

    makespan: float
    jobs: tuple[JobRun, ...]
    busy: float


def simulate(
    plan: Plan,
    problem: Problem,
    *,
    noise: float = 0.0,
    stops: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Simulation:
    """Execute a plan that matches the problem (:func:`plora.planner.check_plan`).

    Args:
        plan: the plan.
        problem: its trials and cost models, which need not be those it was made with.
        noise: standard deviation of the logarithm of each duration: 0.1 is about 10%.
        stops: trials that are stopped early, and after which part of their steps.
        seed: of the noise.

    Raises:
        ValueError: if a stopped trial is unknown or its part is not in (0, 1].
    """
    stops = dict(stops or {})
    known = {load.name for load in problem.loads}
    for name, part in stops.items():
        if name not in known or not 0 < part <= 1:
            raise ValueError(f"stops: {name!r} must be a trial and its part in (0, 1], got {part!r}")
    free = [problem.load_seconds] * plan.n_devices
    runs = []
    busy = 0.0
    for job in sorted(plan.jobs, key=lambda job: (job.start, job.number)):
        start = max(free[device] for device in job.devices)
        noises = random.Random(f"{seed}/{job.number}")
        run = _run_job(job, problem, start, noise, stops, noises)
        for device in job.devices:
            free[device] = run.end
        busy += job.degree * (run.end - run.start)
        runs.append(run)
    end = max(run.end for run in runs)
    return Simulation(end, tuple(sorted(runs, key=lambda run: run.number)), busy / (plan.n_devices * end))


def _run_job(
    job: PlannedJob, problem: Problem, start: float, noise: float, stops: Mapping[str, float], noises: random.Random
) -> JobRun:
    costs = make_costs(problem, job.degree, job.token_budget, max(trial.rank for trial in job.trials))
    index = {load.name: k for k, load in enumerate(problem.loads)}
    steps = {t.name: max(1, round(t.steps * stops.get(t.name, 1.0))) for t in job.trials}
    now = start + costs.start * _factor(noise, noises)
    left: dict[str, int] = {}  # live trials and the steps they have left
    joined: dict[str, float] = {}
    ended: dict[str, float] = {}
    peak, sizes, graphs = 0, [0.0], 0.0
    while len(ended) < len(job.trials):
        for name in job.ready(joined, ended):
            joined[name] = now
            left[name] = steps[name]
        live = [index[name] for name in left]
        assert live, "a job with trials left has one that is ready"
        peak = max(peak, sum(costs.size[k] for k in live))
        rounds = min(left.values())
        sizes.append(sum(costs.step_tokens[k] for k in live))
        known, graphs = graphs, costs.graph_seconds(sizes)
        now += graphs - known
        now += rounds * costs.round_seconds(live) * _factor(noise, noises)
        for name in list(left):
            left[name] -= rounds
            if left[name] == 0:
                del left[name]
                now += _tail(costs, index[name], stops.get(name, 1.0)) * _factor(noise, noises)
                ended[name] = now
    return JobRun(job.number, start, now, joined, ended, peak)


def _tail(costs: Costs, k: int, part: float) -> float:
    """Evaluation goes with the steps taken; saving happens once."""
    save = costs.step.save_seconds(costs.params[k])
    return save + (costs.tail[k] - save) * part


def _factor(noise: float, noises: random.Random) -> float:
    return noises.lognormvariate(0.0, noise) if noise else 1.0
