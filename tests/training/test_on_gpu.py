"""Training on the CUDA kernels: as if alone, as the reference trains, and steady under joins and leaves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from plora import AdapterConfig, pack_adapters
from plora.data.types import Example
from plora.models import from_config, from_pretrained
from plora.models.base import BaseModel
from plora.models.cache import KVCache
from plora.models.presets import SMOLLM2_135M
from plora.models.spec import ModelError
from plora.training import decoding
from plora.training.budget import TokenBudget
from plora.training.evaluation import BASE
from plora.training.generation import Prompt, generate
from plora.training.graphs import MicrobatchGraphs, small_microbatches
from plora.training.optimizer import AdamWConfig, PackedAdamW
from plora.training.rounds import batch_gradients
from tests.training import toy

pytestmark = pytest.mark.gpu

SMALL = {**SMOLLM2_135M, "num_hidden_layers": 4, "vocab_size": toy.VOCAB, "hidden_size": 256, "intermediate_size": 704,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def losses(
    base: BaseModel,
    configs: Sequence[AdapterConfig],
    batches: Sequence[Sequence[Example]],
    steps: int,
    budget: int,
    lr: float,
) -> torch.Tensor:
    """Loss of every adapter at every step ``[steps, adapters]``, each on its own batch over and over."""
    packed = pack_adapters(base.module, configs)
    graphs = small_microbatches(base, packed) or MicrobatchGraphs(base, packed, 1 << 20)
    # The reference's launches depend on the rows, which do not change here.
    graphs._captures = True
    optimizer = PackedAdamW(packed)
    for slot in packed.slots:
        optimizer.add(slot, AdamWConfig(max_grad_norm=1.0))
    seen = []
    for step in range(steps):
        each = dict(enumerate(batches))
        found, _ = batch_gradients(base, packed, each, dict.fromkeys(packed.slots, step), budget, graphs=graphs)
        optimizer.step(dict.fromkeys(packed.slots, (lr, lr)), found)
        seen.append(found[: len(configs)].cpu())
    packed.unpack(base.module)
    return torch.stack(seen)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean relative difference of two runs' losses, of the worst adapter."""
    return ((one - other).abs() / one).mean(0).max().item()


def test_packed_as_if_alone() -> None:
    base = from_config(SMALL, dtype="bf16", device="cuda")
    kinds = ((3, 0.1), (16, 0.0), (64, 0.0), (130, 0.05))
    configs = [AdapterConfig(rank=rank, dropout=dropout, seed=rank) for rank, dropout in kinds]
    batches = [toy.task(f"task{i}", seed=i).train[: 4 * i + 2] for i in range(len(configs))]
    together = losses(base, configs, batches, steps=30, budget=512, lr=3e-3)
    for i, (config, batch) in enumerate(zip(configs, batches, strict=True)):
        alone, other_order = (losses(base, [config], [batch], 30, budget, 3e-3)[:, 0] for budget in (512, 24))
        assert alone[-1] < alone[0]
        spread = distance(alone[:, None], other_order[:, None])
        assert distance(alone[:, None], together[:, i : i + 1]) <= 2 * spread + 5e-3


def test_ranks_of_every_kind_track_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 steps on SmolLM2, or on random weights of its shape where its package is absent."""
    try:
        base = from_pretrained("smollm2-135m-instruct", dtype="bf16", device="cuda")
    except ModelError:
        base = from_config(SMOLLM2_135M, dtype="bf16", device="cuda")
    configs = [AdapterConfig(rank=rank, seed=rank) for rank in (1, 3, 7, 255)]
    batches = [toy.task(f"task{i}", seed=i).train[: 4 + i] for i in range(len(configs))]
    ours, other_order = (losses(base, configs, batches, 200, budget, 2e-4) for budget in (512, 128))
    monkeypatch.setenv("PLORA_BACKEND", "reference")
    reference = losses(base, configs, batches, 200, 512, 2e-4)
    assert (ours[-1] < 0.9 * ours[0]).all()
    assert distance(reference, ours) <= 2 * distance(ours, other_order) + 5e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_do_what_eager_rounds_do(compiled: bool) -> None:
    """Rounds of changing make, adapters joining and leaving, each round both ways from the same weights."""
    base = from_config(SMALL, dtype="bf16", device="cuda")
    ranks = [3, 16, 64, 130, 8, 32]
    packed = pack_adapters(base.module, [AdapterConfig(rank=rank, seed=rank) for rank in ranks])
    if compiled:
        base.compile_layers()
    optimizer = PackedAdamW(packed)
    for slot in packed.slots:
        optimizer.add(slot, AdamWConfig())
    graphs = MicrobatchGraphs(base, packed, 1 << 20, compile_loss=compiled)
    examples, replayed = toy.task("task", seed=0).train, 0
    for i in range(24):
        if i == 12:
            leaving = packed.slots[1]
            optimizer.remove(leaving)
            packed.remove(leaving)
            optimizer.add(packed.add(AdapterConfig(rank=12, dropout=0.1)), AdamWConfig())
        each = {slot: [examples[(i + j) % len(examples)] for j in range(1 + slot)] for slot in packed.slots}
        steps = dict.fromkeys(packed.slots, i)
        expected, _ = batch_gradients(base, packed, each, steps, 300, compile_loss=compiled)
        gradient = packed.arena.grad.clone()
        before = graphs.captured
        found, _ = batch_gradients(base, packed, each, steps, 300, compile_loss=compiled, graphs=graphs)
        replayed += graphs.captured == before > 0
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)
        assert (packed.arena.grad - gradient).norm() <= 2e-2 * gradient.norm()
        optimizer.step(dict.fromkeys(packed.slots, (1e-3, 1e-3)), found)
        if i in (11, 23):
            assert graphs.captured
            assert replayed >= 4
            replayed = 0
    packed.unpack(base.module)


def test_a_hundred_joins_and_leaves_compile_nothing_and_keep_no_memory() -> None:
    base = from_config(SMALL, dtype="bf16", device="cuda")
    batches = [toy.task(f"task{i}", seed=i).train[: 3 + i] for i in range(4)]
    packed = pack_adapters(base.module, [AdapterConfig(rank=64, seed=i) for i in range(4)])
    optimizer = PackedAdamW(packed)
    for slot in packed.slots:
        optimizer.add(slot, AdamWConfig())
    base.compile_layers(fullgraph=True)
    memory = []
    try:
        for i in range(104):
            leaving = packed.slots[i % 4]
            optimizer.remove(leaving)
            packed.remove(leaving)
            optimizer.add(packed.add(AdapterConfig(rank=[1, 7, 16, 33, 64][i % 5], seed=i)), AdamWConfig())
            each = {slot: batches[(slot + i) % 4] for slot in packed.slots}
            found, _ = batch_gradients(base, packed, each, dict.fromkeys(packed.slots, i), 512)
            optimizer.step(dict.fromkeys(packed.slots, (1e-4, 1e-4)), found)
            memory.append(torch.cuda.memory_allocated())
            if i == 3:
                torch._dynamo.config.error_on_recompile = True
    finally:
        torch._dynamo.config.error_on_recompile = False
    assert found.isfinite().all()
    assert max(memory[54:]) <= max(memory[4:54])


QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 704,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": toy.VOCAB,
    "max_position_embeddings": 320, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("config", [{**SMALL, "max_position_embeddings": 320}, QWEN3], ids=["llama", "qwen3"])
def test_decode_graphs_generate_what_eager_steps_do(
    config: dict[str, object], compiled: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Long prompts fill the model's positions after 40 steps and leave; the others go on to further graphs."""
    base = from_config(config, dtype="bf16", device="cuda")
    packed = pack_adapters(base.module, [AdapterConfig(rank=rank, dropout=0.1, seed=rank) for rank in (3, 16, 64, 130)])
    generator = torch.Generator().manual_seed(0)
    for adapter in packed.adapters.values():
        for _, b in adapter.factors().values():
            b.copy_(torch.randn(b.shape, generator=generator) / 10)
    packed.refresh()
    if compiled:
        base.compile_layers()
    lengths = [280] * 6 + torch.randint(1, 50, (24,), generator=generator).tolist()
    rows = [
        Prompt([*packed.slots, BASE][i % 5], torch.randint(0, toy.VOCAB, (length,), generator=generator).tolist())
        for i, length in enumerate(lengths)
    ]
    seen: list[tuple[int, int]] = []
    replays: list[None] = []
    decode, replay = KVCache.decode, torch.cuda.CUDAGraph.replay

    def watched(cache: KVCache, attended: int) -> object:
        seen.append((cache.rows, attended))
        return decode(cache, attended)

    monkeypatch.setattr(KVCache, "decode", watched)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(replay(graph)))
    monkeypatch.setattr(decoding, "_SPACING", 64)

    def answers() -> list[list[int]]:
        seen.clear()
        replays.clear()
        budget = TokenBudget(30 * 320, "generation")
        return generate(base, packed, rows, max_new_tokens=200, stop=(), cache_budget=budget)

    with monkeypatch.context() as patch:  # the same shapes, so that even the last bits agree
        patch.setattr(decoding, "_CAPTURE_STEPS", 1000)
        expected = answers()
        assert not replays
        assert len(seen) == 199
        shapes = set(seen)
    found = answers()
    assert not [record for record in caplog.records if record.name == decoding.__name__]
    assert shapes == {(30, 320), (24, 128), (24, 192), (24, 256)}
    # Each shape runs once and is captured once; all other steps are replayed.
    assert len(seen) == 2 * len(shapes)
    assert set(seen) == shapes
    assert len(replays) == 199 - len(shapes)
    assert [len(answer) for answer in found] == [41] * 6 + [200] * 24
    assert len({tuple(answer) for answer in found}) > 15
    assert found == expected
    assert answers() == expected  # with memory that other graphs have used
    packed.unpack(base.module)
