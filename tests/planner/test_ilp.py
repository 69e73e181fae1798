from __future__ import annotations

import itertools

import pytest

from plora.planner.dtm import Decomposer
from plora.planner.ilp import _ratio, best_pack
from plora.planner.job_planner import plan_jobs
from plora.planner.jobs import Workshop
from tests.planner.instances import BATCHES, RANKS, grid, load, problem

ANY_SHARE = float("inf")


def _loads(seed: int, count: int = 8):
    kinds = list(itertools.product(RANKS, BATCHES, (32, 300)))
    return [
        load(f"t{i}", *kinds[(11 * seed + 17 * i) % len(kinds)][:2], tokens=kinds[(11 * seed + 17 * i) % len(kinds)][2])
        for i in range(count)
    ]


@pytest.mark.parametrize("objective", ["makespan", "rank_throughput"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [ANY_SHARE, 200.0])
def test_the_program_finds_the_best_ratio_of_all_packs(objective, seed, share):
    workshop = Workshop(problem(_loads(seed), gpu="h100", free=24 << 30, objective=objective))
    found = best_pack(workshop, 1, range(8), share, solver="highs", time_limit=20)
    costs = workshop.tables[1][len(workshop.tables[1]) // 2]
    packs = [
        members
        for count in range(1, 9)
        for members in itertools.combinations(range(8), count)
        if costs.fits(members) and sum(costs.work[k] for k in members) <= max(share, *costs.work)
    ]
    best = max(_ratio(workshop, costs, list(members)) for members in packs)
    assert found.throughput == pytest.approx(best, rel=2e-3)
    assert found.throughput == pytest.approx(_ratio(workshop, costs, list(found.members)))


def test_the_program_beats_the_greedy_pack_somewhere():
    gains = []
    for seed in range(6):
        workshop = Workshop(problem(_loads(seed, 12), gpu="h100", free=24 << 30, objective="rank_throughput"))
        exact = best_pack(workshop, 1, range(12), ANY_SHARE, solver="highs", time_limit=20)
        greedy = best_pack(workshop, 1, range(12), ANY_SHARE, solver=None, time_limit=20)
        gains.append(exact.throughput / greedy.throughput)
    assert min(gains) >= 1 - 1e-9
    assert max(gains) > 1.001


def test_a_degree_at_which_nothing_fits_has_no_pack():
    workshop = Workshop(problem([load("a", 128)], count=2, free=12 << 30))
    assert best_pack(workshop, 1, [0], ANY_SHARE, solver="highs", time_limit=5) is None
    assert best_pack(workshop, 2, [0], ANY_SHARE, solver="highs", time_limit=5).members == (0,)


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_a_decomposition_uses_each_device_and_trial_once(devices):
    workshop = Workshop(problem(grid(10), count=devices))
    choice = Decomposer(workshop, "highs", 1.0, 30, float("inf")).decompose(devices, range(10))
    assert sum(degree for degree, _ in choice.jobs) <= devices
    members = [k for _, pack in choice.jobs for k in pack]
    assert len(set(members)) == len(members) > 0
    # Packs share the work, so that no device is left without: the reason for the cap on a pack's work.
    assert sum(degree for degree, _ in choice.jobs) >= min(devices, 8)


@pytest.mark.parametrize("solver", ["highs", None])
@pytest.mark.parametrize("objective", ["makespan", "rank_throughput"])
def test_the_job_planner_runs_every_trial_once_without_sharing_devices(solver, objective):
    given = problem(grid(30), count=4, objective=objective)
    placed = plan_jobs(Workshop(given), solver=solver)
    assert sorted(k for job in placed for k in job.draft.members) == list(range(30))
    for device in range(4):
        spans = sorted(
            (job.start, job.end) for job in placed if job.first_device <= device < job.first_device + job.draft.degree
        )
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert start >= end - 1e-9
