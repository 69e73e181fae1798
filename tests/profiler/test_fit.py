from __future__ import annotations

import random
from dataclasses import replace

import pytest

from plora.models.spec import ModelSpec
from plora.modules.config import AdapterConfig
from plora.profiler import GPUS, MemoryModel, MemorySample, RoundSample, StepCost, estimate, fit_memory, fit_time
from plora.profiler.fit import relative_error
from plora.profiler.memory import GIB, MIB, OVERHEAD, Saved

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
    token_step=PRIOR.token_step,
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


def test_a_slow_round_of_many_at_the_floor_does_not_move_it():
    params = MEMORY.adapter_params(8)
    small = [RoundSample(tokens, 8 * tokens, 1, params, 1, 0.1, 0.0) for tokens in (64, 128, 192, 256, 384)]
    large = [s for s in _rounds(40, 0.0, 1) if s.tokens / s.microbatches > 2500]
    for straggler in range(len(small)):
        odd = [replace(s, seconds=0.16) if i == straggler else s for i, s in enumerate(small)]
        cost = fit_time([*odd, *large], PRIOR)
        assert small[0].predicted(cost) == pytest.approx(0.1, rel=0.03)


def test_where_graphs_launch_small_rounds_there_is_no_floor():
    truth = replace(TRUE, floor=0.0, per_microbatch=5e-3)

    def timed(samples, noise):
        draw = random.Random(3)
        return [replace(s, seconds=s.predicted(truth) * draw.lognormvariate(0, noise)) for s in samples]

    cost = fit_time(timed(_rounds(15, 0.0, 2), 0.03), PRIOR, graphs=True)
    assert cost.floor == 0.0
    assert relative_error(timed(_rounds(60, 0.0, 102), 0.0), cost) < 0.05
    assert PRIOR.floor > 0


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="measure at least one"):
        fit_time([], PRIOR)
    with pytest.raises(ValueError, match="measure at least one pack"):
        fit_memory(MEMORY, [])
    with pytest.raises(ValueError, match="positive seconds"):
        RoundSample(1, 1, 1, 1, 1, 0.0)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_measured_peaks_give_factor_and_libraries_back(device):
    memory = replace(MEMORY, device=device)
    truth = replace(memory, calibration=Saved(1.3, 200 * MIB))
    samples = []
    for tokens, ranks in ((512, (8,)), (2048, (8, 64)), (4096, (128,)), (1024, (16, 16, 16))):
        adapters = tuple(AdapterConfig(rank=rank) for rank in ranks)
        samples.append(MemorySample.of(memory, adapters, tokens, truth.parts(adapters, tokens).allocated))
    fitted = fit_memory(memory, samples)
    assert fitted.calibration.activations == pytest.approx(1.3, rel=0.01)
    if device == "cpu":
        assert fitted.calibration.libraries == pytest.approx(200 * MIB, rel=0.03)
    else:  # half a percent of these peaks does not say much against what is usual
        assert OVERHEAD["cuda"].libraries < fitted.calibration.libraries < 200 * MIB
    # Fitting again does not compound.
    assert fit_memory(fitted, samples).calibration == fitted.calibration


def test_peaks_of_one_size_give_the_factor_alone():
    adapters = (AdapterConfig(rank=8),)
    parts = MEMORY.parts(adapters, 1024)
    assert parts.logits > parts.in_flight
    fitted = fit_memory(MEMORY, [MemorySample.of(MEMORY, adapters, 1024, parts.allocated + parts.activations // 4)])
    assert fitted.calibration.activations == pytest.approx(1.25, rel=0.01)
    assert fitted.calibration.libraries == pytest.approx(parts.libraries, abs=MIB)


def test_peaks_far_below_the_prediction_leave_nothing_negative():
    plain = replace(MEMORY, compiled=True, loss_chunk=1024)
    samples = [
        MemorySample(0, 8, tokens, plain.parts_from_bytes(0, tokens, 8).allocated - 400 * MIB)
        for tokens in (512, 2048, 4096)
    ]
    fitted = fit_memory(plain, samples).calibration
    assert fitted.libraries >= 0
    assert 0 < fitted.activations < 1


def test_labelled_rows_explain_smaller_peaks():
    """Without them the fit would take missing logits for smaller activations."""
    plain = replace(MEMORY, compiled=True)
    sizes = [(512, 512), (4096, 4096), (1024, 100), (2048, 10)]
    peaks = [plain.parts_from_bytes(0, tokens, 8, labels=labels).allocated for tokens, labels in sizes]
    samples = [MemorySample(0, 8, t, peak, labels=n) for (t, n), peak in zip(sizes, peaks, strict=True)]
    assert fit_memory(plain, samples).calibration.activations == pytest.approx(1.0, abs=1e-6)
    unlabelled = [replace(sample, labels=None) for sample in samples]
    assert fit_memory(plain, unlabelled).calibration.activations < 0.99


def test_idle_blocks_are_what_the_allocator_holds_beyond_what_is_known():
    truth = replace(MEMORY, calibration=Saved(idle=0.1))
    samples = [
        MemorySample(0, 8, tokens, parts.allocated, parts.total)
        for tokens in (4096, 256)
        for parts in [truth.parts_from_bytes(0, tokens, 8)]
    ]
    assert fit_memory(MEMORY, samples).calibration.idle == pytest.approx(0.1, rel=1e-3)


def test_the_optimizer_costs_what_it_moves():
    """Rounds in which parameters grow with adapters alone cannot tell their costs apart."""
    prior = replace(PRIOR, per_param=1e-11)
    truth = replace(prior, per_adapter=1e-3)
    samples = [
        RoundSample(tokens, tokens * 8, k, k * 1e7, 1, truth.round_seconds(tokens, tokens * 8, k, k * 1e7, 1))
        for tokens in (128, 1024, 8192)
        for k in (1, 4, 14)
    ]
    assert fit_time(samples, prior).per_param >= 1e-11


# What an H100 held at the peak, GiB: (ranks' sum, largest rank, tokens of the largest microbatch, labelled, measured).
PEAKS = {
    "Qwen/Qwen2.5-7B-Instruct": [
        (368, 128, 128, 128, 30.30), (368, 128, 2016, 2016, 36.31), (368, 128, 4096, 4096, 42.29),
        (368, 128, 8190, 8190, 54.53), (16, 16, 96, 96, 15.33), (16, 16, 1500, 375, 19.41),
        (16, 16, 8000, 2004, 38.41), (768, 128, 8192, 8192, 71.28), (768, 128, 4096, 4096, 59.34),
    ],
    "Qwen/Qwen2.5-0.5B-Instruct": [
        (368, 128, 512, 512, 5.02), (368, 128, 2048, 2048, 6.63), (368, 128, 8120, 8120, 10.49),
        (368, 128, 32760, 8120, 27.20), (16, 16, 96, 96, 1.31), (16, 16, 700, 351, 1.79),
        (16, 16, 1500, 375, 2.30), (368, 128, 6000, 1500, 9.21),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PEAKS)
def test_an_h100_s_peaks_are_predicted_with_and_without_calibration(name):
    plain = MemoryModel(ModelSpec.preset(name), compiled=True, loss_chunk=1024)
    samples = [
        MemorySample(plain.adapter_bytes(ranks), rank, tokens, int(measured * GIB), labels=labels)
        for ranks, rank, tokens, labels, measured in PEAKS[name]
    ]
    calibrated = fit_memory(plain, [sample for sample in samples if sample.max_rank == 128])
    assert 0.95 < calibrated.calibration.activations < 1.02
    for sample in samples:
        for model in (plain, calibrated):
            assert sample.predicted(model).allocated == pytest.approx(sample.peak_bytes, rel=0.045), sample
