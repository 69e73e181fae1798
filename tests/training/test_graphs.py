"""Padded microbatches train as the plain ones do; their shapes are few. Captured ones: see test_on_gpu.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from plora.data.microbatch import pack
from plora.data.types import IGNORE_INDEX, Example
from plora.kernels.schedule import NO_COUNTS
from plora.models.base import BaseModel
from plora.models.spec import ModelError, ModelSpec
from plora.modules.config import AdapterConfig
from plora.modules.packed import PackedAdapters, pack_adapters
from plora.training.graphs import MicrobatchGraphs, graph_tokens, launch_bound_tokens, small_microbatches
from plora.training.inputs import Inputs
from plora.training.rounds import batch_gradients
from tests.training import toy

LENGTHS = {0: [9, 31], 2: [1], 3: [40, 17, 8]}


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return toy.load(toy.save("llama", tmp_path / "llama"))


def example(length: int, labelled: int) -> Example:
    generator = np.random.default_rng(length)
    tokens = generator.integers(0, toy.VOCAB, length + 1, dtype=np.int32)
    labels = tokens[1:].copy()
    labels[: length - labelled] = IGNORE_INDEX
    return Example(tokens[:-1], labels, tokens[:1], "")


def batches(labelled: float = 0.5) -> dict[int, list[Example]]:
    return {slot: [example(n, max(1, round(labelled * n))) for n in each] for slot, each in LENGTHS.items()}


def trained(packed: PackedAdapters) -> PackedAdapters:
    """With a B that is not zero, so that A has gradients."""
    for adapter in packed.adapters.values():
        with torch.no_grad():
            adapter.B.copy_(torch.randn(adapter.B.shape, generator=torch.Generator().manual_seed(adapter.slot)) / 10)
    return packed


def packed_on(base: BaseModel) -> PackedAdapters:
    kinds = ((4, 0.0), (1, 0.0), (7, 0.5), (16, 0.1))
    return trained(pack_adapters(base.module, [AdapterConfig(rank=r, dropout=d, seed=r) for r, d in kinds]))


@pytest.mark.parametrize("labelled", [0.0, 0.5, 1.0])
def test_padding_changes_neither_loss_nor_gradient(base: BaseModel, labelled: float) -> None:
    packed, each = packed_on(base), batches(labelled)
    steps = dict.fromkeys(each, 3)
    plain, _ = batch_gradients(base, packed, each, steps, 60)
    gradient = packed.arena.grad.clone()
    graphs = MicrobatchGraphs(base, packed, 1000)
    padded, count = batch_gradients(base, packed, each, steps, 60, graphs=graphs)
    assert count == 2
    assert graphs.padding == 2 * 64 - sum(map(sum, LENGTHS.values()))
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(packed.arena.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_a_rounds_gradients_take_the_place_of_what_was_there(base: BaseModel, padded: bool) -> None:
    packed, each = packed_on(base), batches()
    steps = dict.fromkeys(each, 3)
    graphs = MicrobatchGraphs(base, packed, 1000) if padded else None
    _, count = batch_gradients(base, packed, each, steps, 60, graphs=graphs)
    assert count == 2
    expected = packed.arena.grad.clone()
    untouched = packed.adapters[1].range  # of no batch
    packed.arena.grad.fill_(torch.nan)
    packed.arena.grad[untouched] = 7.0
    batch_gradients(base, packed, each, steps, 60, graphs=graphs)
    for slot in each:
        for found, right in zip(
            *(sum(packed.adapters[slot].factors(flat).values(), ()) for flat in (packed.arena.grad, expected)),
            strict=True,
        ):
            assert torch.equal(found, right)
    assert (packed.arena.grad[untouched] == 7.0).all()


def test_a_diverged_adapter_harms_no_other_through_the_padding(base: BaseModel) -> None:
    packed, each = packed_on(base), batches(0.2)
    with torch.no_grad():
        packed.adapters[3].B.fill_(torch.nan)
    packed.refresh()
    losses, _ = batch_gradients(base, packed, each, {}, 1000, graphs=MicrobatchGraphs(base, packed, 1000))
    assert losses.isnan().tolist() == [slot == 3 for slot in range(packed.capacity)]
    assert packed.arena.grad[packed.adapters[0].range].isfinite().all()


def test_only_small_ones_are_taken(base: BaseModel) -> None:
    packed, each = packed_on(base), batches()
    small, large = sorted(pack(each, 60), key=lambda microbatch: len(microbatch.tokens))
    graphs = MicrobatchGraphs(base, packed, len(small.tokens))
    assert graphs.takes(small)
    assert not graphs.takes(large)
    assert small_microbatches(base, packed) is None  # the CUDA kernels do not run here


def test_similar_microbatches_share_a_shape() -> None:
    shapes = set()
    generator = np.random.default_rng(0)
    for _ in range(100):
        lengths = {slot: generator.integers(100, 160, 2).tolist() for slot in range(8)}
        (microbatch,) = pack({slot: [example(n, n // 4) for n in each] for slot, each in lengths.items()}, 10**6)
        inputs = Inputs.of(microbatch, dict.fromkeys(lengths, 1))
        shape = inputs.padded_shape()
        padded = inputs.padded(shape, spare_slot=8)
        assert len(inputs.tokens) <= shape.tokens <= 1.125 * len(inputs.tokens) + 64
        assert [len(padded.tokens), len(padded.cu_seqlens) - 1, len(padded.rows)] == list(shape[:3])
        assert padded.cu_seqlens.diff().min() >= 0
        assert padded.cu_seqlens[-1] == shape.tokens
        assert padded.cu_seqlens.diff().max() <= shape.max_len
        assert len(padded.rows.unique()) == shape.labels
        shapes.add(shape)
    assert len(shapes) <= 6


def ragged_run(graphs: MicrobatchGraphs, lengths: list[int]) -> None:
    (microbatch,) = pack({0: [example(n, max(1, n // 4)) for n in lengths]}, 10**6)
    graphs.forward_backward(microbatch, {0: 1}, {})


def test_few_graphs_serve_ragged_microbatches(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, generator = MicrobatchGraphs(base, packed_on(base), 4096), np.random.default_rng(0)
    shapes: list[int] = []
    monkeypatch.setattr(graphs, "_run", lambda entry: shapes.append(len(entry.inputs.tokens)))
    tokens = 0
    for _ in range(40):
        lengths = generator.integers(5, 64, generator.integers(20, 30)).tolist()
        tokens += sum(lengths)
        ragged_run(graphs, lengths)
    assert len(graphs._entries) <= 4
    assert sum(shapes) == tokens + graphs.padding <= 1.4 * tokens


def test_a_graph_is_made_when_doing_without_has_cost_as_much(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = MicrobatchGraphs(base, packed_on(base), 4096, graph_cost=400)
    shapes: list[int] = []
    monkeypatch.setattr(graphs, "_run", lambda entry: shapes.append(len(entry.inputs.tokens)))
    for length in (60, *[50] * 5):
        ragged_run(graphs, [length] * 10)
    assert shapes == [704, 704, 704, 512, 512, 512]


def test_none_is_padded_beyond_the_budget(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PackedAdapters, "work_counts", NO_COUNTS)
    graphs = small_microbatches(base, packed_on(base), 10**6, token_budget=600)
    assert graphs is not None
    shapes: list[int] = []
    monkeypatch.setattr(graphs, "_run", lambda entry: shapes.append(len(entry.inputs.tokens)))
    for length, count in ((55, 10), (60, 10), (59, 10)):
        ragged_run(graphs, [length] * count)
    assert graphs.most_tokens == 600
    assert shapes == [576, 600, 600]


def test_large_models_are_seldom_bound_by_launches() -> None:
    tokens = [launch_bound_tokens(ModelSpec.preset(f"Qwen/Qwen2.5-{size}")) for size in ("0.5B", "3B", "7B", "32B")]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] > 10000
    assert 1000 < tokens[2] < 4000


def test_sequences_too_long_for_the_model_are_refused(base: BaseModel) -> None:
    """A graph that was captured for a shorter one of the same shape would not look."""
    packed = packed_on(base)
    graphs = MicrobatchGraphs(base, packed, 1000)
    (microbatch,) = pack({0: [example(base.spec.max_positions + 1, 3)]}, 1000)
    with pytest.raises(ModelError, match="exceeds the 64 positions"):
        graphs.forward_backward(microbatch, {0: 3}, {})


def test_nothing_is_given_up_where_there_are_no_graphs(base: BaseModel) -> None:
    graphs = MicrobatchGraphs(base, packed_on(base), 1000)
    assert not graphs.release()
    assert graphs.most_tokens == 1000


def test_graphs_are_planned_for_where_the_kernels_run_or_would(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, here, gpu = ModelSpec.preset("Qwen/Qwen2.5-7B"), torch.device("cpu"), torch.device("cuda")
    assert graph_tokens(spec, here, "bf16") == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a plan for a GPU that is not here
    assert graph_tokens(spec, gpu, "bf16") == launch_bound_tokens(spec)
    assert graph_tokens(spec, gpu, "fp32") == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PLORA_BACKEND", "reference")
    assert graph_tokens(spec, gpu, "bf16") == 0
