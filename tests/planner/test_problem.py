from __future__ import annotations

import pytest

from plora.models.spec import ModelSpec
from plora.modules.config import AdapterConfig
from plora.planner import legal_degrees, load_trials
from plora.planner.problem import check_fits, group_loads
from plora.search.trial import Trial
from tests.planner.instances import GIB, grid, load, problem


@pytest.mark.parametrize(
    ("model", "degrees"),
    [
        ("Qwen/Qwen2.5-0.5B", (1, 2)),  # 14 heads, 2 key-value heads
        ("Qwen/Qwen2.5-7B", (1, 2, 4)),  # 28 and 4
        ("Qwen/Qwen2.5-32B", (1, 2, 4, 8)),  # 40 and 8
        ("HuggingFaceTB/SmolLM2-135M", (1,)),  # 9 and 3
    ],
)
def test_degrees_are_powers_of_two_that_divide_heads_and_key_value_heads(model, degrees):
    assert legal_degrees(ModelSpec.preset(model), 8) == degrees


def test_degrees_stop_at_the_number_of_devices():
    assert legal_degrees(ModelSpec.preset("Qwen/Qwen2.5-32B"), 3) == (1, 2)
    # 32 heads would allow 16 and 32, 8 key-value heads do not.
    assert legal_degrees(ModelSpec.preset("meta-llama/Llama-3.1-8B"), 32) == (1, 2, 4, 8)


def test_loads_count_steps_and_tokens_of_a_batch():
    trials = [
        Trial(0, "a", AdapterConfig(rank=8), batch_size=4, epochs=2.0),
        Trial(1, "b", AdapterConfig(rank=32, target_modules=("q_proj",)), batch_size=100, epochs=None, max_steps=7),
    ]
    spec = ModelSpec.preset("Qwen/Qwen2.5-7B")
    first, second = load_trials(
        trials, spec, lambda trial: [10, 20, 30, 40, 50], eval_tokens=lambda trial: 99 if trial.name == "a" else 0
    )
    assert (first.steps, first.tokens_per_step, first.longest, first.eval_tokens) == (4, 120.0, 50, 99)
    # A batch larger than the data set is the whole data set.
    assert (second.steps, second.tokens_per_step, second.rank, second.eval_tokens) == (7, 150.0, 32, 0)


def test_loads_refuse_an_empty_data_set_and_an_unknown_target():
    spec = ModelSpec.preset("Qwen/Qwen2.5-7B")
    with pytest.raises(ValueError, match="no training examples"):
        load_trials([Trial(0, "a", AdapterConfig())], spec, lambda trial: [])
    with pytest.raises(ValueError, match=r"names c_attn.*q_proj"):
        load_trials([Trial(0, "a", AdapterConfig(target_modules=("c_attn",)))], spec, lambda trial: [5])


def test_more_steps_than_any_training_has_are_refused():
    spec = ModelSpec.preset("Qwen/Qwen2.5-7B")
    with pytest.raises(ValueError, match=r"trial a has more than 1e\+12 steps: lower its epochs"):
        load_trials([Trial(0, "a", AdapterConfig(), epochs=1e300)], spec, lambda trial: [5])


def test_alike_loads_are_grouped_in_order():
    loads = [load("a", 8), load("b", 16), load("c", 8)]
    assert group_loads(loads) == [[0, 2], [1]]
    assert len(group_loads(grid(500))) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0, "degrees": (1,)}, "at least one device"),
        ({"max_adapters": 0}, "max_adapters must be at least 1, got 0"),
        ({"token_budget": 100}, r"100 tokens \(packing.tokens_per_microbatch\), but the longest sequence has 512"),
        ({"objective": "fast"}, "objective must be one of makespan, rank_throughput, got 'fast'"),
        ({"count": 8, "degrees": (3,)}, "degree 3 does not suit Qwen2.5-7B"),
        ({"count": 8, "degrees": (8,)}, "28 heads and 4 key-value heads"),
        ({"count": 2, "degrees": (4,)}, "degree 4 needs 4 devices, there are 2"),
    ],
)
def test_contradictory_limits_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        problem([load("a")], **change)


def test_empty_and_doubled_trials_are_refused():
    with pytest.raises(ValueError, match="no trials"):
        problem([])
    with pytest.raises(ValueError, match="more than once: a"):
        problem([load("a"), load("b"), load("a")])


def test_a_trial_that_fits_nowhere_is_refused_with_the_numbers():
    with pytest.raises(ValueError) as caught:
        check_fits(problem([load("small", 8), load("large", 128)], free=15 * GIB))
    text = str(caught.value)
    for part in ("trial large (rank 128", "15.0 GiB are free", "base weights 14.2 GiB", "adapters 5.4 GiB", "2 trials"):
        assert part in text
    # The keys of a configuration.
    for remedy in ("change: dtype: nf4", "smaller rank", "optimizer_state: 8bit"):
        assert remedy in text


def test_a_trial_that_fits_at_a_higher_degree_is_not_refused():
    with pytest.raises(ValueError, match="does not fit"):
        check_fits(problem([load("a", 128)], free=12 * GIB, count=1))
    check_fits(problem([load("a", 128)], free=12 * GIB, count=2))
