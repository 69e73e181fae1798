"""Making the plan: every planner answers, local search improves the best answers, and the soonest end wins."""

from __future__ import annotations

import logging
import time

from plora.planner.bounds import lower_bounds
from plora.planner.check import check_plan
from plora.planner.greedy import greedy
from plora.planner.groups import long_lived_groups
from plora.planner.improve import PATIENCE, Improver
from plora.planner.job_planner import plan_jobs
from plora.planner.jobs import Draft, Placed, Workshop, makespan, place
from plora.planner.plan import Plan, plan_jobs_of, replay
from plora.planner.problem import Problem, check_fits
from plora.planner.solver import choose_solver

logger = logging.getLogger(__name__)

# Evaluations of the local search: of each start, of the best three of them, and of the best; so many times as many as
# there are trials beyond these.
USUAL_TRIALS = 120
FIRST_EVALUATIONS = 300
NEXT_EVALUATIONS = 1000
MORE_EVALUATIONS = 2000
# Then the best plan is shaken by some random moves and searched from again.
SHAKES = 15
SHAKE_MOVES = 6


def make_plan(
    problem: Problem,
    *,
    solver: str = "auto",
    time_limit: float = 15.0,
    gap: float = 0.01,
    seed: int = 0,
    incumbent: Plan | None = None,
) -> Plan:
    """Plan a sweep.

    Candidates are the greedy answer, long-lived groups, PLoRA's job planner (the integer programs) and an incumbent;
    local search starts from them. A planner is left out once an answer is within ``gap`` of the lower bound. With the
    objective ``rank_throughput`` nothing is searched: the job planner's answer stands unless the greedy one or the
    incumbent ends sooner.

    Args:
        problem: trials, devices and cost models.
        solver: ``auto``, ``highs``, ``cbc`` or ``none``.
        time_limit: seconds after which no further search starts; an answer is at hand long before. The plan is
            the same for the same seed as long as this limit is not reached.
        gap: relative distance to the lower bound that is good enough.
        seed: of the local search.
        incumbent: a plan for these trials; the answer is never worse than it, as far as it still fits.

    Raises:
        ValueError: for a trial that fits nowhere, an unknown or missing solver, or an incumbent that does not match.
    """
    deadline = time.monotonic() + time_limit
    engine = choose_solver(solver)
    check_fits(problem)
    workshop = Workshop(problem)
    bounds = lower_bounds(problem)
    answers = {"greedy": place(greedy(workshop), problem.n_devices)}
    if incumbent is not None:
        check_plan(incumbent, problem)
        answers["incumbent"] = replay(problem, incumbent)
    good = bounds.best * (1 + gap)
    if problem.objective == "rank_throughput":
        _add_job_planner(answers, workshop, engine, deadline)
    else:
        _search(answers, workshop, engine, bounds.best, good, seed, deadline)
    method = min(answers, key=lambda name: makespan(answers[name]))
    placed = answers[method]
    return Plan(
        model=problem.memory.spec.name,
        dtype=problem.memory.quantize or problem.memory.dtype,
        recomputed_layers=problem.memory.recomputed_layers,
        graph_tokens=problem.memory.graph_tokens,
        device=problem.time.device,
        n_devices=problem.n_devices,
        free_bytes=problem.free_bytes,
        objective=problem.objective,
        method=method,
        estimated=problem.time.estimated,
        makespan=makespan(placed),
        lower_bound=bounds.best,
        bound_reason=bounds.reason,
        jobs=plan_jobs_of(problem, placed),
        candidates={name: makespan(answer) for name, answer in sorted(answers.items())},
    )


def _add_job_planner(
    answers: dict[str, list[Placed]], workshop: Workshop, engine: str | None, deadline: float, name: str = "plora"
) -> None:
    jobs = plan_jobs(workshop, solver=engine, deadline=deadline)
    if jobs is None:
        logger.warning("the job planner left trials that fit on no group of free devices: its answer is not used")
    else:
        answers[name] = jobs


def _search(
    answers: dict[str, list[Placed]],
    workshop: Workshop,
    engine: str | None,
    bound: float,
    good: float,
    seed: int,
    deadline: float,
) -> None:
    """Add answers until one is good enough or the search is spent; the integer programs take longest and come last."""
    n_devices = workshop.problem.n_devices
    scale = max(1.0, len(workshop.problem.loads) / USUAL_TRIALS)
    improver = Improver(workshop, bound, seed, target=good / bound - 1, patience=round(PATIENCE * scale))

    def unfinished() -> bool:
        return min(makespan(answer) for answer in answers.values()) > good and time.monotonic() < deadline

    def improve(drafts: list[Draft], evaluations: int) -> list[Draft]:
        improved = improver.run(drafts, round(evaluations * scale), deadline) if unfinished() else drafts
        placed = place(improved, n_devices)
        if "search" not in answers or makespan(placed) < makespan(answers["search"]):
            answers["search"] = placed
        return improved

    if not unfinished():
        return
    groups = long_lived_groups(workshop)
    if groups:
        answers["groups"] = place(groups[0], n_devices)
    # The job planner with greedy packs costs little and is another kind of start.
    _add_job_planner(answers, workshop, None, deadline, "greedy packs")
    starts = [improve(start, FIRST_EVALUATIONS) for start in [*map(_drafts, answers.values()), *groups[1:]]]
    for start in sorted(starts, key=lambda drafts: makespan(place(drafts, n_devices)))[:3]:
        improve(start, NEXT_EVALUATIONS)
    improve(_drafts(answers["search"]), MORE_EVALUATIONS)
    if unfinished():
        _add_job_planner(answers, workshop, engine, deadline)
        if "plora" in answers:
            improve(improve(_drafts(answers["plora"]), FIRST_EVALUATIONS), NEXT_EVALUATIONS)
    for _ in range(SHAKES):
        if not unfinished():
            break
        improve(improver.shake(_drafts(answers["search"]), SHAKE_MOVES), NEXT_EVALUATIONS)


def _drafts(placed: list[Placed]) -> list[Draft]:
    return [job.draft for job in sorted(placed, key=lambda job: (job.start, job.first_device))]
