from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from plora.models.spec import ModelSpec
from plora.profiler import GPUS, MemoryModel, StepCost, TimeModel, estimate, estimate_cpu, find_gpu, one_at_a_time
from plora.profiler.hardware import host_free_bytes

SEVEN_B = MemoryModel(ModelSpec.preset("Qwen/Qwen2.5-7B"), compiled=True)
COST = StepCost(
    floor=0.1,
    per_microbatch=0.01,
    per_token=1e-4,
    per_token_rank=1e-6,
    per_adapter=1e-3,
    per_param=1e-9,
    per_step=0.002,
)


def test_a_round_is_the_larger_of_floor_and_work_plus_the_optimizer():
    optimizer = 5e6 * 1e-9 + 0.002
    assert COST.round_seconds(10, 100, 2, 5e6, 1) == pytest.approx(0.1 + optimizer)
    assert COST.round_seconds(10, 100, 2, 5e6, 2) == pytest.approx(0.2 + optimizer)
    work = 3 * 0.01 + 6000 * 1e-4 + 90000 * 1e-6 + 2 * 1e-3
    assert COST.round_seconds(6000, 90000, 2, 5e6, 3) == pytest.approx(work + optimizer)


def test_sequences_and_their_squares_are_what_attention_takes():
    cost = replace(COST, per_square=1e-8, per_sequence=1e-5)
    more = cost.round_seconds(6000, 0, 1, 0, 1, 0, 6e5, 50) - COST.round_seconds(6000, 0, 1, 0, 1, 0, 6e5, 50)
    assert more == pytest.approx(6e5 * 1e-8 + 50 * 1e-5)


def test_a_microbatch_takes_longer_until_the_tiles_are_full():
    cost = replace(COST, per_tile=2e-3, tile_params=8e6)

    def more(params: float, microbatches: int) -> float:
        work = (6000, 90000, 2, params, microbatches)
        return cost.round_seconds(*work) - COST.round_seconds(*work)

    assert more(4e6, 1) == pytest.approx(1e-3)
    assert more(4e6, 3) == pytest.approx(3e-3)
    assert more(8e6, 1) == pytest.approx(more(8e9, 1)) == pytest.approx(2e-3)
    assert one_at_a_time(TimeModel("h100", {1: cost}), SEVEN_B, None).cost(1).per_tile == 0


def test_the_h100_estimate_agrees_with_what_was_measured_there():
    # 18.8k tokens/s with the base alone; adapters of the standard mix (mean rank 24) take some of it.
    cost = estimate(GPUS["h100"], SEVEN_B).cost(1)
    seconds = cost.round_seconds(8192, 24 * 8192, 32, SEVEN_B.adapter_params(768), 1)
    assert 14_000 < 8192 / seconds < 18_500
    # Eager peft: 171 ms for 128 tokens, 655 for 8192.
    peft = one_at_a_time(estimate(GPUS["h100"], SEVEN_B), SEVEN_B, GPUS["h100"]).cost(1)
    params = SEVEN_B.adapter_params(16)
    assert peft.round_seconds(128, 16 * 128, 1, params, 1) == pytest.approx(0.171, rel=0.1)
    assert peft.round_seconds(8192, 16 * 8192, 1, params, 1) == pytest.approx(0.655, rel=0.1)


def test_graphs_take_the_launches_of_layers_away():
    deep = replace(SEVEN_B, spec=replace(SEVEN_B.spec, num_layers=56))
    small = MemoryModel(ModelSpec.preset("Qwen/Qwen2.5-0.5B"), compiled=True)
    plain = {memory: estimate(GPUS["h100"], memory).cost(1) for memory in (SEVEN_B, deep, small)}
    assert plain[deep].floor == pytest.approx(2 * plain[SEVEN_B].floor)
    # Measured: medians of 0.15 s over 28 layers and 0.145 s over 24.
    assert plain[SEVEN_B].floor == pytest.approx(0.15, rel=0.2)
    assert plain[small].floor == pytest.approx(0.145, rel=0.2)
    graphs = estimate(GPUS["h100"], replace(small, graph_tokens=4096)).cost(1)
    assert 0.003 <= graphs.floor <= 0.008
    assert graphs.per_decode_step < plain[small].per_decode_step / 3
    same = {name: getattr(plain[small], name) for name in ("floor", "per_graph", "per_decode_step")}
    assert replace(graphs, **same) == plain[small]


def test_the_optimizer_passes_over_fewer_bytes_with_8bit_moments():
    exact, small = (estimate(GPUS["h100"], replace(SEVEN_B, moments=each)).cost(1) for each in ("exact", "8bit"))
    assert exact.per_param * 3.35e12 * 0.8 == pytest.approx(34)
    assert small.per_param == pytest.approx(exact.per_param * 22 / 34)


@pytest.mark.parametrize("name", sorted(GPUS))
def test_every_gpu_has_a_sound_estimate_at_every_degree(name):
    model = estimate(GPUS[name], SEVEN_B, (1, 2, 4))
    assert model.estimated
    tokens = 16384
    seconds = [model.cost(d).round_seconds(tokens, 16 * tokens, 4, 1e8, 2) for d in (1, 2, 4)]
    # More devices are faster, and never more than in proportion.
    for degree, (slow, fast) in zip((2, 4), itertools.pairwise(seconds), strict=True):
        assert slow / 2 < fast < slow * (1.0 if GPUS[name].link > 1e11 else 1.6), degree
    assert model.cost(2).floor >= model.cost(4).floor * 0.9


def test_faster_devices_are_faster_and_recomputation_costs():
    rounds = {name: estimate(GPUS[name], SEVEN_B).cost(1).round_seconds(8192, 16 * 8192, 4, 1e8, 1) for name in GPUS}
    assert rounds["h100"] < rounds["a100_80gb"] < rounds["rtx_4090"] < rounds["a10"]
    recomputing = replace(SEVEN_B, activation_checkpointing=True)
    slow, fast = (estimate(GPUS["h100"], memory).cost(1) for memory in (recomputing, SEVEN_B))
    assert slow.per_token == pytest.approx(1.5 * fast.per_token)
    assert slow.per_label == fast.per_label


def test_the_cpu_estimate_agrees_with_what_was_measured():
    # A 135M model on two cores: about 280 tokens/s in fp32, 500 in bf16.
    spec = ModelSpec.preset("HuggingFaceTB/SmolLM2-135M")
    for dtype, rate in (("fp32", 280), ("bf16", 500)):
        cost = estimate_cpu(MemoryModel(spec, dtype, device="cpu"), 2).cost(1)
        assert 1 / (cost.per_token + cost.per_label) == pytest.approx(rate, rel=0.15)


def test_measured_degrees_replace_estimates():
    model = estimate(GPUS["h100"], SEVEN_B, (1, 2))
    measured = model.measured(1, COST)
    assert measured.cost(1).floor == 0.1
    assert not measured.cost(1).estimated
    assert measured.cost(2) == model.cost(2)
    assert measured.estimated
    assert not TimeModel("h100", {1: replace(COST, estimated=False)}).estimated


def test_missing_degrees_and_impossible_coefficients_are_named():
    with pytest.raises(ValueError, match="degree 8: there is one for 1, 2"):
        estimate(GPUS["h100"], SEVEN_B, (1, 2)).cost(8)
    with pytest.raises(ValueError, match="per_token must be a number of seconds that is not negative, got -1"):
        replace(COST, per_token=-1.0)
    with pytest.raises(ValueError, match="no coefficients"):
        TimeModel("h100", {})


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("a100_40gb", "a100_40gb"),
        ("A100 40GB", "a100_40gb"),
        ("a100-80gb", "a100_80gb"),
        ("RTX 4090", "rtx_4090"),
        ("rtx4090", "rtx_4090"),
    ],
)
def test_gpus_are_found_by_their_driver_names(name, found):
    assert find_gpu(name).name == found


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA A1000", "NVIDIA L40S", "b200"])
def test_an_unknown_gpu_is_not_taken_for_another(name):
    with pytest.raises(ValueError, match=r"no data sheet for the GPU .* use one of a10, a100_40gb"):
        find_gpu(name)


def test_free_host_memory_is_within_the_machine(monkeypatch, tmp_path):
    import psutil

    assert 0 < host_free_bytes() <= psutil.virtual_memory().total
    limits = {"memory.max": 1000, "memory.current": 900}
    monkeypatch.setattr("plora.profiler.hardware._cgroup_bytes", limits.get)
    monkeypatch.setattr("plora.profiler.hardware._cgroup_page_cache", lambda: 50)
    assert host_free_bytes() == 150


def test_rounds_of_just_so_many_tokens_cost_whole_steps() -> None:
    """On average, over all numbers of tokens, as much as a plan takes them to cost."""
    cost = replace(estimate(GPUS["h100"], SEVEN_B).cost(1), floor=0.0)
    step = cost.token_step
    assert step == 128
    exact = [cost.round_seconds(tokens, 0.0, 1, 0.0, 1, labels=0) for tokens in range(4 * step + 1, 5 * step + 1)]
    assert max(exact) == pytest.approx(min(exact))
    assert exact[0] == pytest.approx(cost.round_of(4.5 * step, 0.0, 1, 0.0, 1))
    assert cost.even_tokens(2 * 4.5 * step, 2) == pytest.approx(2 * 4.5 * step)
    assert replace(cost, token_step=1).even_tokens(77, 3) == 77


def test_products_of_few_tokens_wait_for_the_weights() -> None:
    """Also where a plan knows tokens on average only."""
    cost = replace(estimate(GPUS["h100"], SEVEN_B).cost(1), floor=0.0)
    step = cost.token_step
    full = cost.round_of(2 * step, 0.0, 1, 0.0, 2)
    assert cost.round_of(40, 0.0, 1, 0.0, 2) == cost.round_seconds(40, 0.0, 1, 0.0, 2, labels=0) == full
    assert cost.round_of(2 * step + 1, 0.0, 1, 0.0, 2) > full


def test_a_cpu_computes_no_whole_tiles():
    cost = estimate_cpu(MemoryModel(ModelSpec.preset("HuggingFaceTB/SmolLM2-135M"), "fp32", device="cpu"), 1).cost(1)
    work = {"token_rank": 0.0, "adapters": 1, "params": 0.0, "microbatches": 1}
    assert cost.round_seconds(100, **work) > 1.1 * cost.round_seconds(40, **work)
