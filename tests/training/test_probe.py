"""Rounds measured for calibration are rounds as jobs train them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plora.models.base import BaseModel
from plora.modules.config import computed_rank
from plora.training.job import PackJob
from plora.training.peaks import PeakMemory
from plora.training.probe import PackProbe
from plora.training.records import JobSettings
from tests.training import toy


@pytest.fixture
def peaks() -> PeakMemory:
    return PeakMemory(torch.device("cpu"))


def test_a_round_counts_what_it_trains(base: BaseModel, peaks: PeakMemory) -> None:
    with PackProbe(base, [4, 16, 1], peaks) as probe:
        measured = probe.round([(10, 20), (), (30,)], 40, labelled=0.5, repeats=2)
        params = [probe.packed.adapters[slot].layout.numel for slot in (0, 2)]
        weights = probe.packed.arena.weight.clone()
        probe.round([(5,), (5,), (5,)], 40)
        assert not torch.equal(probe.packed.arena.weight, weights)  # it trains
    assert (measured.tokens, measured.token_rank, measured.squares) == (60, 30 * 16 + 30 * 16, 100 + 400 + 900)
    assert (measured.adapters, measured.params, measured.microbatches) == (2, sum(params), 2)
    assert measured.sequences == 3
    assert measured.labels == 5 + 10 + 15
    assert 30 <= measured.largest <= 40
    assert measured.seconds > 0
    assert measured.warmup_seconds == 0
    assert measured.reserved is None


def test_the_base_is_as_it_was(base: BaseModel, peaks: PeakMemory) -> None:
    paths = [name for name, _ in base.module.named_modules()]
    with PackProbe(base, [4], peaks) as probe:
        steady, more = probe.evaluation(40, 20)
        assert steady > 0
        assert more == 0
        assert probe.generation(3, 5, 4) > 0
        assert [name for name, _ in base.module.named_modules()] != paths
    assert [name for name, _ in base.module.named_modules()] == paths


def test_saving_leaves_nothing(base: BaseModel, peaks: PeakMemory, tmp_path: Path) -> None:
    with PackProbe(base, [4], peaks) as probe:
        assert probe.save(0, tmp_path) > 0
    assert not list(tmp_path.iterdir())


def test_other_adapters_take_the_place_of_those_there(base: BaseModel, peaks: PeakMemory) -> None:
    with PackProbe(base, [16, 16], peaks) as probe:
        size = probe.packed.arena.numel
        probe.replace([4, 8, 2])
        assert [adapter.config.rank for adapter in probe.packed.adapters.values()] == [4, 8, 2]
        assert probe.packed.arena.numel == size
        assert probe.round([(5,), (6,), (7,)], 40).adapters == 3


def test_a_job_reports_the_same_counts(base: BaseModel) -> None:
    trials, tasks = toy.mixed_trials(steps=2)
    packed = toy.pack(base, [trial.adapter for trial in trials])
    recorder = toy.Recorder()
    job = PackJob(base, packed, trials, tasks, JobSettings(token_budget=64, eval_every=None), recorder)
    live = {slot: packed.adapters[slot] for slot in packed.slots}
    params = sum(adapter.layout.numel for adapter in live.values())
    job.run()
    packed.unpack(base.module)
    first = recorder.rounds[0]
    tokens = {trial.name: recorder.steps[trial.name][0].tokens for trial in trials}
    assert first.tokens == sum(tokens.values())
    assert first.token_rank == sum(tokens[trial.name] * computed_rank(trial.adapter.rank) for trial in trials)
    assert first.params == params
    assert 0 < first.labels < first.tokens
    assert first.squares >= first.tokens**2 / 20  # at most 20 sequences
    assert job.times.evaluation > 0
    assert job.times.base > 0


def test_peaks_rise_with_what_is_held_and_are_forgotten(peaks: PeakMemory) -> None:
    if peaks.allocated is None:
        pytest.skip("this kernel does not tell the peak of a process")
    peaks.reset()
    before = peaks.allocated
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert peaks.allocated - before > 60 * 2**20
    del held
    assert peaks.allocated - before > 60 * 2**20
    peaks.reset()
    if peaks.allocated - before > 30 * 2**20:
        pytest.skip("this kernel keeps the peak of a process")
    assert peaks.allocated - before < 16 * 2**20


def test_runs_that_compile_are_told_from_steady_ones(
    base: BaseModel, peaks: PeakMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late:
        """A round that took as long as the test says."""

        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def wait(self) -> tuple[list[list[float]], float]:
            return [], self.seconds

    # Two that compile, one that shows it is over, one that found the device idle, then three steady ones.
    seconds = iter([30.0, 5.0, 1.0, 1.1, 1.5, 1.0, 0.8, 0.9])
    monkeypatch.setattr(PackProbe, "_queue", lambda *_: (Late(next(seconds)), 1))
    with PackProbe(base, [4], peaks) as probe:
        probe._compiled = True
        measured = probe.round([(10,)], 40, repeats=3)
    assert measured.seconds == 0.9
    assert measured.warmup_seconds == pytest.approx(29.1 + 4.1 + 0.1 + 0.2)
    assert next(seconds, None) is None
