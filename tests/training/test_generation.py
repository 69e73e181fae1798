"""Packed greedy generation against running alone and against Hugging Face."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from plora.models.base import BaseModel
from plora.models.cache import KVCache
from plora.modules.config import AdapterConfig
from plora.modules.packed import PackedAdapters
from plora.training import generation
from plora.training.budget import TokenBudget
from plora.training.evaluation import BASE
from plora.training.generation import Prompt, generate
from tests.training import toy

CONFIGS = [
    AdapterConfig(rank=4, alpha=8),
    AdapterConfig(rank=2, dropout=0.5, target_modules=("v_proj", "o_proj")),
    AdapterConfig(rank=9),
]
NEW = 12


def packed_with_effect(base: BaseModel) -> PackedAdapters:
    """Adapters whose B is not zero, so that each says something else."""
    packed = toy.pack(base, CONFIGS)
    generator = torch.Generator().manual_seed(3)
    for adapter in packed.adapters.values():
        for _, b in adapter.factors().values():
            b.copy_(0.3 * torch.randn(b.shape, generator=generator))
    packed.refresh()
    return packed


def prompts(n: int = 14) -> list[Prompt]:
    rng = np.random.default_rng(0)
    subjects = [int(s) for s in rng.permutation([0, 1, 2, BASE] * n)[:n]]
    return [Prompt(s, rng.integers(2, toy.VOCAB, rng.integers(1, 17)).astype(np.int32)) for s in subjects]


def run(base: BaseModel, packed: PackedAdapters, rows: list[Prompt], **options: object) -> list[list[int]]:
    settings = {"max_new_tokens": NEW, "stop": (1,), "cache_budget": TokenBudget(10_000, "generation"), **options}
    return generate(base, packed, rows, **settings)  # type: ignore[arg-type]


def frequent_stops(answers: list[list[int]]) -> tuple[int, ...]:
    """Tokens that end some rows early and others not."""
    return tuple({answer[i] for i, answer in enumerate(answers) if i % 3 == 0 and i < len(answer)})


def test_row_does_not_depend_on_its_company(folders: dict[str, Path], family: str) -> None:
    base = toy.load(folders[family])
    packed, rows = packed_with_effect(base), prompts()
    stop = frequent_stops(run(base, packed, rows))
    alone = [run(base, packed, [row], stop=stop)[0] for row in rows]
    assert run(base, packed, rows, stop=stop) == alone
    assert run(base, packed, rows[::-1], stop=stop)[::-1] == alone
    assert run(base, packed, rows, stop=stop, cache_budget=TokenBudget(60, "generation")) == alone
    lengths = {len(answer) for answer in alone}
    assert NEW in lengths
    assert len(lengths) > 2
    packed.unpack(base.module)


def test_equals_hugging_face_generate(folders: dict[str, Path], family: str) -> None:
    from tests.training.test_oracle import peft_model

    base = toy.load(folders[family])
    fresh = toy.pack(base, CONFIGS)
    models = {BASE: transformers.AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).eval()}
    trial = toy.mixed_trials()[0][0]
    for slot, config in enumerate(CONFIGS):
        plain = type(config)(**{**config.__dict__, "dropout": 0.0})
        models[slot] = peft_model(folders[family], base, fresh, slot, type(trial)(0, "x", plain), None)  # type: ignore[arg-type]
    fresh.unpack(base.module)
    packed, rows = packed_with_effect(base), prompts()
    for slot in range(3):
        models[slot], layers = models[slot]
        for path, (a, b) in packed.adapters[slot].factors().items():
            order = base.export_rows(path)
            layers[path].lora_A["default"].weight.data.copy_(a)
            layers[path].lora_B["default"].weight.data.copy_(b if order is None else b[order])
    stop = frequent_stops(run(base, packed, rows))
    ours = run(base, packed, rows, stop=stop)
    for row, answer in zip(rows, ours, strict=True):
        ids = torch.tensor([row.tokens.tolist()])  # type: ignore[attr-defined]
        theirs = models[row.subject].generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
            eos_token_id=list(stop), pad_token_id=0,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        assert answer == [token for token in theirs if token not in stop]
    packed.unpack(base.module)


def test_adapters_differ_from_each_other_and_from_the_base(base: BaseModel) -> None:
    packed = packed_with_effect(base)
    answers = run(base, packed, [Prompt(subject, [5, 6, 7]) for subject in (0, 1, 2, BASE)])
    assert len({tuple(answer) for answer in answers}) == 4


def test_finished_rows_leave_the_batch(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, rows = packed_with_effect(base), prompts(32)
    sizes = []
    decode = KVCache.decode
    monkeypatch.setattr(KVCache, "decode", lambda cache, *args: (sizes.append(cache.rows), decode(cache, *args))[1])
    answers = run(base, packed, rows, stop=range(2, toy.VOCAB, 9))
    needed = sum(max(0, min(len(answer) + 1, NEW) - 1) for answer in answers)
    assert sizes == sorted(sizes, reverse=True)
    assert needed <= sum(sizes) < 1.3 * needed


def test_rows_per_batch_follow_the_cache_budget(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []

    class Watched(KVCache):
        def __init__(self, rows: int, max_len: int, device: object) -> None:
            held.append(rows * max_len)
            super().__init__(rows, max_len, device)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "KVCache", Watched)
    packed = packed_with_effect(base)
    run(base, packed, prompts(), cache_budget=TokenBudget(80, "generation"))
    assert len(held) > 3
    assert max(held) <= 80


def test_out_of_memory_shrinks_the_batch(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, rows = packed_with_effect(base), prompts()
    expected = run(base, packed, rows)
    decode = KVCache.decode

    def limited(cache: KVCache, *args: int) -> object:
        if cache.rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(cache, *args)

    monkeypatch.setattr(KVCache, "decode", limited)
    assert run(base, packed, rows) == expected


def test_prompts_are_run_in_bounded_pieces(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, rows = packed_with_effect(base), prompts()
    expected = run(base, packed, rows)
    monkeypatch.setattr(generation, "_PREFILL_TOKENS", 20)
    assert run(base, packed, rows) == expected


def test_answer_ends_with_the_models_positions(base: BaseModel) -> None:
    packed = packed_with_effect(base)
    long, short = Prompt(0, [7] * 60), Prompt(1, [7] * 3)
    # So many short rows that one finished row alone is no reason to compact the batch.
    answers = run(base, packed, [long, *[short] * 20], max_new_tokens=30, stop=())
    # 60 prompt tokens and 4 read back fill the 64 positions; the fifth new token is never read.
    assert [len(answer) for answer in answers] == [5] + [30] * 20
    assert answers[1] == run(base, packed, [short], max_new_tokens=30, stop=())[0]


@pytest.mark.parametrize(
    ("tokens", "new", "message"), [([], 5, "0 tokens"), ([3] * 65, 5, "65 tokens"), ([3], 0, "at least 1")]
)
def test_impossible_requests_are_refused(base: BaseModel, tokens: list[int], new: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(base, packed_with_effect(base), [Prompt(0, tokens)], max_new_tokens=new)
