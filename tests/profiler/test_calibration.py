from __future__ import annotations

from dataclasses import replace

import pytest

from plora.models.spec import ModelSpec
from plora.profiler import GPUS, MemoryModel, RoundSample, calibration_rounds, estimate, estimate_cpu, fit_time
from plora.profiler.calibration import PACKS, Calibration
from plora.profiler.fit import typical

SEVEN_B = MemoryModel(ModelSpec.preset("Qwen/Qwen2.5-7B"), compiled=True)
SMALL = MemoryModel(ModelSpec.preset("HuggingFaceTB/SmolLM2-135M"), "bf16", device="cpu")
CASES = [
    (SEVEN_B, estimate(GPUS["h100"], SEVEN_B).cost(1), GPUS["h100"].free_bytes),
    (SEVEN_B, estimate(GPUS["a10"], SEVEN_B).cost(1), GPUS["a10"].free_bytes),
    (SMALL, estimate_cpu(SMALL, 2).cost(1), 8 << 30),
]


def samples(memory, cost, chosen: Calibration) -> list[RoundSample]:
    """What rounds would take if ``cost`` were the truth."""
    made = []
    for each in chosen.rounds:
        used = [(rank, own) for rank, own in zip(chosen.ranks, each.lengths, strict=True) if own]
        plain = RoundSample(
            each.tokens,
            sum(rank * sum(own) for rank, own in used),
            len(used),
            sum(memory.adapter_params(rank) for rank, _ in used),
            -(-each.tokens // each.token_budget),
            1.0,
            each.tokens * each.labelled,
            sum(length**2 for _, own in used for length in own),
            sum(len(own) for _, own in used),
        )
        made.append(replace(plain, seconds=plain.predicted(cost)))
    return made


@pytest.mark.parametrize(("memory", "cost", "free"), CASES)
def test_the_pack_fits_and_its_rounds_are_short_and_differ(memory, cost, free):
    chosen = calibration_rounds(memory, cost, free)
    assert chosen is not None
    state = sum(memory.adapter_bytes(rank) for rank in chosen.ranks)
    for each in chosen.rounds:
        assert len(each.lengths) == len(chosen.ranks)
        assert memory.parts_from_bytes(state, min(each.tokens, each.token_budget), max(chosen.ranks)).total <= free
        assert all(length <= each.token_budget for own in each.lengths for length in own)
    rounds = samples(memory, cost, chosen)
    assert sum(sample.seconds for sample in rounds) < 17
    assert len({sample.shape for sample in rounds}) >= 8
    assert {sample.microbatches for sample in rounds} >= {1, 2}
    assert len({round(sample.labels / sample.tokens, 1) for sample in rounds}) == 3


@pytest.mark.parametrize(("memory", "cost", "free"), CASES)
def test_its_rounds_tell_the_coefficients_apart(memory, cost, free):
    chosen = calibration_rounds(memory, cost, free)
    truth = replace(
        cost,
        per_token=1.5 * cost.per_token,
        per_token_rank=2 * cost.per_token_rank,
        per_label=0.7 * cost.per_label,
        per_square=3 * cost.per_square,
        per_sequence=2 * cost.per_sequence,
        per_param=1.3 * cost.per_param,
        per_tile=0.5 * cost.per_tile,
        per_adapter=4 * cost.per_adapter,
        floor=0.6 * cost.floor,
    )
    fitted = fit_time(samples(memory, truth, chosen), cost)
    # Rounds of a size that a sweep has, by one adapter and by all.
    for tokens, adapters, rank, labelled, length in (
        (4096, 1, 16, 1.0, 128), (8192, 32, 24, 0.3, 200), (600, 4, 64, 1.0, 60), (100, 1, 8, 1.0, 100),
    ):  # fmt: skip
        params = memory.adapter_params(adapters * rank)
        work = (tokens, tokens * rank, adapters, params, 1, labelled * tokens, tokens * length, tokens // length)
        assert fitted.round_seconds(*work) == pytest.approx(truth.round_seconds(*work), rel=0.1)


@pytest.mark.parametrize(("memory", "cost", "free_bytes"), CASES)
def test_no_two_rounds_count_as_alike(memory, cost, free_bytes):
    chosen = calibration_rounds(memory, cost, free_bytes)
    assert chosen is not None
    made = samples(memory, cost, chosen)
    assert len(typical(made)) == len(made)


def test_less_memory_takes_a_smaller_pack_and_none_at_last():
    memory, cost, _ = CASES[0]
    packs = [chosen.ranks for free in (78, 30, 22, 18) if (chosen := calibration_rounds(memory, cost, free << 30))]
    assert packs == sorted(packs, key=sum, reverse=True)
    assert packs[0] == PACKS[0]
    assert len(set(packs)) > 1
    assert calibration_rounds(memory, cost, 14 << 30) is None


def test_no_sequence_is_longer_than_the_model_allows():
    short = replace(SEVEN_B, spec=replace(SEVEN_B.spec, max_positions=100))
    chosen = calibration_rounds(short, CASES[0][1], GPUS["h100"].free_bytes)
    assert max(length for each in chosen.rounds for own in each.lengths for length in own) <= 100
    sliding = replace(SEVEN_B, spec=replace(SEVEN_B.spec, sliding_window=64))
    chosen = calibration_rounds(sliding, CASES[0][1], GPUS["h100"].free_bytes)
    assert max(length for each in chosen.rounds for own in each.lengths for length in own) <= 64
