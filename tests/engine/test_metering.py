"""What a job took, taken apart, from records made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plora.engine.costs import CostModels
from plora.engine.metering import JobMeter, compare, learn
from plora.engine.planning import SweepPlan
from plora.models.spec import ModelSpec
from plora.planner import Load, make_problem, plan_on
from plora.profiler import MemoryModel
from plora.training.records import JobTimes, RoundRecord

MEMORY = MemoryModel(ModelSpec.preset("HuggingFaceTB/SmolLM2-135M"), dtype="fp32", device="cpu")
LOADS = [Load("a", 8, 20, 400.0, 100), Load("b", 16, 30, 800.0, 100)]


class Peaks:
    """Memory as the test wants it."""

    allocated: int | None = 3 << 30
    reserved: int | None = None

    def reset(self) -> None:
        pass


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def planned(tmp_path: Path) -> tuple[CostModels, SweepPlan]:
    models = CostModels(torch.device("cpu"), tmp_path)
    limits = {"time": models.time, "free_bytes": 8 << 30}
    _, plan = plan_on(LOADS, [MEMORY], None, 1, **limits)
    return models, SweepPlan(make_problem(LOADS, MEMORY, None, 1, **limits), plan, 8 << 30)


def record(index: int, seconds: float, tokens: int = 1200) -> RoundRecord:
    return RoundRecord(index, tokens, 0, 1, seconds, 2, 0, 8 * tokens, tokens // 2, 50 * tokens, 10**6)


def finished(planned: SweepPlan, peaks: Peaks, seconds: list[float], total: float, times: JobTimes, set_up=()):
    clock = Clock()
    meter = JobMeter(planned.plan.jobs[0], peaks, clock)  # type: ignore[arg-type]
    for index, each in enumerate(seconds, start=1):
        meter.on_round(replace(record(index, each), set_up=int(index in set_up)))
    clock.now = total
    return meter.finish(times)


def test_a_job_is_taken_apart(planned: tuple[CostModels, SweepPlan]) -> None:
    seconds = [9.0, 2.0] + 18 * [1.0] + 10 * [0.5]  # the first compiles, the last are without a
    measured = finished(planned[1], Peaks(), seconds, 50.0, JobTimes(base=3.0, evaluation=4.0, saving=2.0))
    assert measured is not None
    assert measured.seconds == 47.0
    assert (measured.evaluation, measured.saving) == (4.0, 2.0)
    assert measured.round_seconds == 1.0
    # 7 s before the first round, and what the first rounds took more than usual.
    assert measured.start == pytest.approx(47 - sum(seconds) - 6 + 8 + 1)
    assert len(measured.rounds) == 28
    assert (measured.largest, measured.labels) == (1200, 600)


def test_rounds_that_prepare_graphs_are_not_steady(planned: tuple[CostModels, SweepPlan]) -> None:
    seconds = 10 * [1.0] + [1.4] + 9 * [1.0]
    measured = finished(planned[1], Peaks(), seconds, 25.0, JobTimes(), set_up=(11,))
    assert measured is not None
    assert len(measured.rounds) == 19
    assert measured.start == pytest.approx(25 - sum(seconds))
    short = finished(planned[1], Peaks(), [1.0, 3.0, 1.0], 5.0, JobTimes(), set_up=(2,))
    assert short is not None
    assert len(short.rounds) == 3


def test_it_is_compared_with_its_prediction(planned: tuple[CostModels, SweepPlan]) -> None:
    (job,) = planned[1].plan.jobs
    slow = 1.5 * job.round_seconds
    measured = finished(planned[1], Peaks(), 30 * [slow], 30 * slow + 1, JobTimes())
    assert measured is not None
    figures = {figure.what: figure for figure in compare(job, measured).figures}
    assert figures["step"].error == pytest.approx(0.5)
    assert figures["step"].is_off
    process = figures["memory of the process"]
    assert (process.predicted, process.measured) == (job.memory_bytes, 3 << 30)
    on_gpu = {each.what: each for each in compare(job, replace(measured, reserved=4 << 30)).figures}
    assert on_gpu["memory, live tensors"].measured == 3 << 30
    assert on_gpu["memory, with the allocator's share"].measured == 4 << 30
    assert "memory of the process" not in on_gpu
    assert figures["whole job"].predicted == job.seconds


def test_the_next_plan_has_learned_from_it(planned: tuple[CostModels, SweepPlan]) -> None:
    models, plan = planned
    (job,) = plan.plan.jobs
    slow = 3 * job.round_seconds
    measured = finished(plan, Peaks(), 30 * [slow], 30 * slow + 1, JobTimes())
    assert measured is not None
    learn(models, plan, job, measured)
    sample = measured.rounds[0]
    before, after = models.estimate(MEMORY).cost(1), models.time(MEMORY).cost(1)
    assert sample.predicted(after) == pytest.approx(slow, rel=0.02)
    assert after.per_token > 2 * before.per_token
    assert models.profile(MEMORY).peaks[0].peak_bytes == 3 << 30  # type: ignore[union-attr]
    assert models.profile(MEMORY).peaks[0].labels == 600  # type: ignore[union-attr]
    known = models.memory(MEMORY).parts_from_bytes(sum(plan.sizes(job).values()), 1200, 16, labels=600)
    assert known.allocated == pytest.approx(3 << 30, rel=0.02)


def test_it_learns_what_evaluating_and_saving_cost(planned: tuple[CostModels, SweepPlan]) -> None:
    models, plan = planned
    loads = [replace(load, eval_tokens=5000) for load in LOADS]
    plan = replace(plan, problem=replace(plan.problem, loads=tuple(loads)))
    (job,), cost = plan.plan.jobs, plan.cost
    evaluation = 2 * cost.eval_seconds(10_000, 10_000)
    saving = 3 * sum(cost.save_seconds(MEMORY.adapter_params(load.rank)) for load in loads)
    measured = finished(plan, Peaks(), [1.0] * 10, 100.0, JobTimes(evaluation=evaluation, saving=saving))
    assert measured is not None
    learn(models, plan, job, measured)
    after = models.time(MEMORY).cost(1)
    assert after.start == measured.start + cost.eval_start
    assert after.save_seconds(10**6) == pytest.approx(3 * cost.save_seconds(10**6))
    assert 10_000 * (after.per_eval_token + cost.per_label / 2) == pytest.approx(evaluation)


def test_what_is_compiled_once_is_no_part_of_a_start(planned: tuple[CostModels, SweepPlan]) -> None:
    models, plan = planned
    (job,) = plan.plan.jobs
    measured = finished(plan, Peaks(), [1.0] * 10, 100.0, JobTimes())
    assert measured is not None
    learn(models, plan, job, measured, compiled=False)
    short = finished(plan, Peaks(), [1.0] * 4, 100.0, JobTimes())
    assert short is not None
    learn(models, plan, job, short)  # which tells slow rounds from steady ones
    before, after = models.estimate(MEMORY).cost(1), models.time(MEMORY).cost(1)
    assert after.start == before.start
    assert after.compile == measured.start + before.eval_start - before.start > 80


def test_small_peaks_on_a_cpu_and_jobs_without_rounds_say_nothing(planned: tuple[CostModels, SweepPlan]) -> None:
    peaks = Peaks()
    peaks.allocated = 50 << 20
    measured = finished(planned[1], peaks, [1.0], 2.0, JobTimes())
    assert measured is not None
    assert measured.allocated is None
    assert finished(planned[1], peaks, [], 2.0, JobTimes()) is None
