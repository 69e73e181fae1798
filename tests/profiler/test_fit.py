from __future__ import annotations

import random
from dataclasses import replace

import pytest

from plora.models.spec import ModelSpec
from plora.modules.config import AdapterConfig
from plora.profiler import GPUS, MemoryModel, MemorySample, RoundSample, StepCost, estimate, fit_memory, fit_time
from plora.profiler.fit import relative_error
from plora.profiler.memory import MIB, Saved

MEMORY = MemoryModel(ModelSpec.preset("Qwen/Qwen2.5-7B"))
PRIOR = estimate(GPUS["h100"], MEMORY).cost(1)
TRUE = StepCost(
    floor=0.09,
    per_microbatch=0.004,
    per_token=7e-5,
    per_token_rank=1.1e-7,
    per_adapter=3e-4,
    per_param=2e-11,
    per_step=0.003,
)


def _rounds(count: int, noise: float, seed: int) -> list[RoundSample]:
    """Packs of random make, the first two of one small adapter: a profile has to see the launch floor."""
    draw = random.Random(seed)
    samples = []
    for number in range(count):
        adapters = draw.randint(1, 32) if number > 1 else 1
        ranks = [draw.choice((8, 16, 32, 64, 128)) for _ in range(adapters)]
        tokens = [draw.choice((32, 128, 512)) for _ in range(adapters)]
        params = 2.5e6 * sum(ranks)
        token_rank = sum(t * r for t, r in zip(tokens, ranks, strict=True))
        microbatches = -(-sum(tokens) // 4096)
        seconds = TRUE.round_seconds(sum(tokens), token_rank, adapters, params, microbatches, 0.0)
        factor = draw.lognormvariate(0, noise) if noise else 1.0
        samples.append(RoundSample(sum(tokens), token_rank, adapters, params, microbatches, seconds * factor, 0.0))
    return samples


def test_exact_rounds_give_the_coefficients_back():
    cost = fit_time(_rounds(40, 0.0, 1), PRIOR)
    assert not cost.estimated
    for name in ("floor", "per_token", "per_token_rank", "per_param"):
        assert getattr(cost, name) == pytest.approx(getattr(TRUE, name), rel=0.06), name
    assert (cost.start, cost.save) == (PRIOR.start, PRIOR.save)


@pytest.mark.parametrize("seed", range(3))
def test_a_dozen_noisy_rounds_predict_unseen_ones(seed):
    cost = fit_time(_rounds(12, 0.02, seed), PRIOR)
    unseen = _rounds(60, 0.0, 100 + seed)
    errors = sorted(abs(sample.predicted(cost) / sample.seconds - 1) for sample in unseen)
    assert errors[int(0.95 * len(errors))] < 0.10
    assert relative_error(unseen, cost) < 0.05


def test_a_fit_is_never_worse_than_the_scaled_prior():
    for seed in range(5):
        samples = _rounds(6, 0.1, seed)
        scaled = fit_time(samples[:4], PRIOR)
        assert relative_error(samples, fit_time(samples, PRIOR)) <= relative_error(samples, scaled) + 1e-9


def test_few_rounds_scale_the_prior():
    samples = [replace(s, seconds=2.5 * s.predicted(PRIOR)) for s in _rounds(3, 0.0, 1)]
    cost = fit_time(samples, PRIOR)
    assert cost.per_token == pytest.approx(2.5 * PRIOR.per_token)
    assert cost.floor == pytest.approx(2.5 * PRIOR.floor)
    assert cost.save == PRIOR.save


def test_without_rounds_at_the_floor_the_floor_stays_below_them():
    samples = [s for s in _rounds(60, 0.0, 1) if s.tokens / s.microbatches > 2500]
    cost = fit_time(samples, PRIOR)
    assert 0 < cost.floor <= min(s.seconds / s.microbatches for s in samples)


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="measure at least one"):
        fit_time([], PRIOR)
    with pytest.raises(ValueError, match="measure at least one pack"):
        fit_memory(MEMORY, [])
    with pytest.raises(ValueError, match="positive seconds"):
        RoundSample(1, 1, 1, 1, 1, 0.0)


def test_measured_peaks_give_factor_and_constant_back():
    truth = replace(MEMORY, calibration=Saved(1.3, 200 * MIB))
    samples = []
    for tokens, ranks in ((512, (8,)), (2048, (8, 64)), (4096, (128,)), (1024, (16, 16, 16))):
        adapters = tuple(AdapterConfig(rank=rank) for rank in ranks)
        peak = truth.parts(adapters, tokens).allocated + 200 * MIB
        samples.append(MemorySample.of(MEMORY, adapters, tokens, peak))
    fitted = fit_memory(MEMORY, samples)
    assert fitted.calibration.activations == pytest.approx(1.3, rel=1e-3)
    assert fitted.calibration.fixed == pytest.approx(200 * MIB, rel=0.03)
    # Fitting again does not compound.
    assert fit_memory(fitted, samples).calibration == fitted.calibration


def test_peaks_of_one_size_give_the_factor_alone():
    adapters = (AdapterConfig(rank=8),)
    parts = MEMORY.parts(adapters, 1024)
    fitted = fit_memory(MEMORY, [MemorySample.of(MEMORY, adapters, 1024, parts.allocated + parts.activations // 4)])
    assert fitted.calibration.activations == pytest.approx(1.25, rel=0.01)
    assert abs(fitted.calibration.fixed) < MIB
