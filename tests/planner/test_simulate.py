from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora.planner import make_plan, simulate
from tests.planner.instances import grid, model, problem, problems


@settings(max_examples=12, deadline=None)
@given(problems(8))
def test_without_surprises_the_prediction_comes_true(given_problem):
    plan = make_plan(given_problem, time_limit=0.3)
    run = simulate(plan, given_problem)
    assert run.makespan == pytest.approx(plan.makespan)
    for job, ran in zip(plan.jobs, run.jobs, strict=True):
        assert ran.start == pytest.approx(job.start)
        assert ran.end == pytest.approx(job.end)
        assert set(ran.trial_ends) == {trial.name for trial in job.trials}


def test_making_graphs_is_in_the_prediction_and_comes_true():
    memory = replace(model(), graph_tokens=4096)
    given_problem = problem(grid(6), gpu="h100", memory=memory)
    plan = make_plan(given_problem, time_limit=0.3)
    assert simulate(plan, given_problem).makespan == pytest.approx(plan.makespan)
    free = replace(given_problem.time.cost(1), per_graph=0.0)
    without = replace(given_problem, time=replace(given_problem.time, costs={1: free}))
    assert simulate(plan, without).makespan < plan.makespan - 3 * given_problem.time.cost(1).per_graph + 1e-6


@settings(max_examples=12, deadline=None)
@given(problems(8), st.lists(st.floats(0.01, 1.0), min_size=8, max_size=8), st.integers(0, 5))
def test_early_stops_refill_within_the_predicted_memory(given_problem, parts, seed):
    plan = make_plan(given_problem, time_limit=0.3)
    stops = {load.name: part for load, part in zip(given_problem.loads, parts, strict=False)}
    run = simulate(plan, given_problem, stops=stops, noise=0.2, seed=seed)
    for job, ran in zip(plan.jobs, run.jobs, strict=True):
        planned_peak = (
            job.memory_bytes
            - given_problem.memory.parts_from_bytes(
                0, job.token_budget, max(trial.rank for trial in job.trials), degree=job.degree
            ).total
        )
        assert ran.peak_bytes <= planned_peak
        live = [
            sum(ran.trial_starts[other] <= ran.trial_starts[name] < ran.trial_ends[other] for other in ran.trial_ends)
            for name in ran.trial_ends
        ]
        assert given_problem.max_adapters is None or max(live) <= given_problem.max_adapters


def test_stopping_trials_early_ends_the_sweep_sooner():
    given_problem = problem(grid(30), count=2)
    plan = make_plan(given_problem, time_limit=1)
    stops = {load.name: 0.05 for load in given_problem.loads[::2]}
    assert simulate(plan, given_problem, stops=stops).makespan < 0.7 * plan.makespan


def test_noise_is_deterministic_and_moderate():
    given_problem = problem(grid(30), count=4)
    plan = make_plan(given_problem, time_limit=1)
    runs = [simulate(plan, given_problem, noise=0.1, seed=seed).makespan for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert 0.9 < runs[0] / plan.makespan < 1.25


def test_unknown_stops_are_refused():
    given_problem = problem(grid(3))
    plan = make_plan(given_problem, time_limit=1)
    with pytest.raises(ValueError, match="'nobody'"):
        simulate(plan, given_problem, stops={"nobody": 0.5})
    with pytest.raises(ValueError, match="got 0"):
        simulate(plan, given_problem, stops={"t000": 0})


def test_a_waiting_trial_joins_when_its_planned_predecessors_have_ended():
    given_problem = problem(grid(16), count=1, max_adapters=2)
    job = make_plan(given_problem, time_limit=1).jobs[0]
    first = [trial.name for trial in job.trials if trial.start_round == 0]
    assert job.ready((), ()) == first
    assert len(first) == 2
    shorter = min((trial for trial in job.trials if trial.start_round == 0), key=lambda trial: trial.steps)
    ended = {trial.name for trial in job.trials if trial.start_round == 0 and trial.end_round == shorter.end_round}
    follower = next(trial for trial in job.trials if trial.start_round == shorter.end_round)
    assert job.ready(first, ()) == []
    assert follower.name in job.ready(first, ended)
