"""Losses, label words and generated answers of many subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from plora.data.types import IGNORE_INDEX, Example, Task
from plora.models.base import BaseModel
from plora.modules.config import AdapterConfig
from plora.training.budget import TokenBudget
from plora.training.evaluation import BASE, choices, label_word_accuracy, validation_losses
from plora.training.metrics import exact_match
from plora.training.scorers import (
    Generated,
    GenerationSettings,
    generation_scorer,
    label_word_scorer,
    score_generation,
    subset,
)
from tests.training import toy
from tests.training.test_generation import packed_with_effect


def _hf_nll(model: torch.nn.Module, example: Example) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.inputs.tolist()])).logits[0]
    return F.cross_entropy(logits, torch.tensor(example.labels.tolist()), reduction="sum", ignore_index=-100).item()


@pytest.mark.parametrize("budget", [25, 64, 10_000])
def test_base_loss_equals_hugging_face(folders: dict[str, Path], family: str, budget: int) -> None:
    base = toy.load(folders[family])
    packed = packed_with_effect(base)
    examples = toy.task("first", 1).val
    scores = validation_losses(base, packed, {BASE: examples, 2: examples}, TokenBudget(budget, "test"), {BASE: "v"})
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).eval()
    nll = [_hf_nll(model, example) for example in examples]
    counts = [example.n_labels for example in examples]
    assert scores[BASE].value == pytest.approx(sum(nll) / sum(counts), rel=1e-5)
    assert scores[BASE].per_example == pytest.approx([x / n for x, n in zip(nll, counts, strict=True)], rel=1e-4)
    assert (scores[BASE].examples, scores[BASE].n) == ("v", len(examples))
    assert scores[2].value != pytest.approx(scores[BASE].value, rel=1e-2)


def test_scores_do_not_depend_on_company_and_dropout_is_off(base: BaseModel) -> None:
    packed = packed_with_effect(base)
    first, second = toy.task("first", 1).val, toy.task("second", 2).val
    budget = TokenBudget(64, "test")
    together = validation_losses(base, packed, {0: first, 1: second, 2: first, BASE: second}, budget)
    for subject, examples in ((0, first), (1, second), (2, first), (BASE, second)):
        assert validation_losses(base, packed, {subject: examples}, budget)[subject] == together[subject]
    assert packed.adapters[1].config.dropout > 0


def test_evaluation_leaves_no_gradient_and_no_change(base: BaseModel) -> None:
    packed = packed_with_effect(base)
    before = packed.arena.weight.clone()
    validation_losses(base, packed, {0: toy.task("first", 1).val}, TokenBudget(64, "test"))
    assert torch.equal(packed.arena.weight, before)
    assert not packed.arena.grad.any()


def test_empty_split_is_named(base: BaseModel) -> None:
    packed = packed_with_effect(base)
    with pytest.raises(ValueError, match="score slot 1 on"):
        validation_losses(base, packed, {1: []}, TokenBudget(64, "test"))


class WordTokenizer:
    """Words are numbers; an answer of several numbers has several tokens; 1 ends it."""

    stop_ids = (1,)

    def candidates(self, example: Example, answers: Sequence[str]) -> list[Example]:
        made = []
        for answer in answers:
            tokens = np.array([*map(int, answer.split()), 1], dtype=np.int32)
            whole = np.concatenate((example.prompt, tokens))
            labels = whole[1:].copy()
            labels[: len(example.prompt) - 1] = IGNORE_INDEX
            made.append(replace(example, inputs=whole[:-1], labels=labels))
        return made

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def _classification(n: int = 20) -> list[Example]:
    words = ["10", "20 30", "40"]
    rng = np.random.default_rng(0)
    return [
        replace(example, answer=words[rng.integers(3)], fields={"label_words": words})
        for example in toy.task("many", 5, n=n).train
    ]


def test_label_words_are_compared_by_their_summed_likelihood(folders: dict[str, Path], base: BaseModel) -> None:
    packed, examples = packed_with_effect(base), _classification()
    made = choices(WordTokenizer(), examples)
    scores = label_word_accuracy(base, packed, {BASE: made, 0: made}, TokenBudget(100, "test"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32).eval()
    right = []
    for example in examples:
        words = example.fields["label_words"]
        nll = [_hf_nll(model, c) for c in WordTokenizer().candidates(example, words)]
        right.append(float(words[int(np.argmin(nll))] == example.answer))
    assert 0 < sum(right) < len(right)
    assert scores[BASE].per_example == tuple(right)
    assert scores[0].per_example != scores[BASE].per_example
    for _, b in packed.adapters[0].factors().values():
        b.fill_(float("nan"))
    assert label_word_accuracy(base, packed, {0: made}, TokenBudget(100, "test"))[0].value == 0


def test_answer_outside_the_label_words_is_refused() -> None:
    example = replace(_classification(1)[0], answer="50")
    with pytest.raises(ValueError, match="'50' is not among the label words"):
        choices(WordTokenizer(), [example])


def test_generated_answers_are_scored_per_subject(base: BaseModel) -> None:
    packed = packed_with_effect(base)
    tokenizer = WordTokenizer()
    settings = GenerationSettings(exact_match(), max_new_tokens=6, max_examples=5)
    examples = toy.task("first", 1).val
    first: dict[int, Generated] = score_generation(base, packed, tokenizer, {0: examples, BASE: examples}, settings)  # type: ignore[arg-type]
    assert len(first[0].predictions) == len(first[0].examples) == 5
    assert first[0].predictions != first[BASE].predictions
    # With slot 0's own words as the references it is right everywhere, and the base is not.
    own = [replace(e, answer=p) for e, p in zip(first[0].examples, first[0].predictions, strict=True)]
    again = score_generation(base, packed, tokenizer, {0: own, BASE: own}, settings)  # type: ignore[arg-type]
    assert again[0].score.value == 1.0
    assert again[BASE].score.value < 1.0
    scorer = generation_scorer(base, packed, tokenizer, settings)  # type: ignore[arg-type]
    assert scorer.score({0: Task("own", [], own, [])})[0].value == 1.0


def test_label_word_scorer_reports_every_subject(base: BaseModel) -> None:
    packed, examples = packed_with_effect(base), _classification()
    task = Task("words", examples, examples, [])
    scorer = label_word_scorer(base, packed, WordTokenizer(), token_budget=100)  # type: ignore[arg-type]
    scores = scorer.score({1: task, BASE: task})
    made = choices(WordTokenizer(), examples)
    assert scores[1].value == label_word_accuracy(base, packed, {1: made}, TokenBudget(100, "t"))[1].value
    assert scores[BASE].examples == "words"


def test_subset_is_even_and_fixed() -> None:
    examples = toy.task("first", 1).train
    chosen = subset(examples, 4)
    assert [examples.index(e) for e in chosen] == [0, 13, 26, 39]
    assert subset(examples, None) == subset(examples, 99) == examples


def test_adapter_with_zero_b_has_exactly_the_loss_of_the_base(base: BaseModel) -> None:
    packed = toy.pack(base, [AdapterConfig(rank=4)] * 3)
    examples = toy.task("first", 1).val
    scores = validation_losses(base, packed, {s: examples for s in (0, 1, 2, BASE)}, TokenBudget(64, "test"))
    assert len({score.value for score in scores.values()}) == 1
