"""Scores beside the loss, ready for a job or for use on their own: label words and generated answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from plora.data.tokenizer import ChatTokenizer
from plora.data.types import Example, Task
from plora.models.base import BaseModel
from plora.modules.packed import PackedAdapters
from plora.training.budget import TokenBudget
from plora.training.evaluation import Choice, choices, label_word_accuracy
from plora.training.generation import Prompt, generate
from plora.training.metrics import Metric, Score
from plora.training.records import Scorer

LABEL_ACCURACY = "label_accuracy"
EXACT_MATCH = "exact_match"


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated for scoring.

    Args:
        metric: ``(prediction, example) -> number``, see `plora.training.metrics`.
        max_new_tokens: at most so many tokens an answer.
        max_examples: score so many examples, spread evenly over the split; None for all.
        cache_tokens: tokens that the key-value cache may hold at a time.
    """

    metric: Metric
    max_new_tokens: int = 256
    max_examples: int | None = None
    cache_tokens: int = 65536


@dataclass(frozen=True)
class Generated:
    """Generated answers of one subject.

    Args:
        score: mean of the metric.
        examples: the examples that were answered.
        predictions: the text for each.
        tokens: new tokens of each; ``max_new_tokens`` of them where the answer was cut off.
    """

    score: Score
    examples: tuple[Example, ...]
    predictions: tuple[str, ...]
    tokens: tuple[int, ...]


def subset(examples: Sequence[Example], n: int | None) -> list[Example]:
    """``n`` examples spread evenly over all, always the same ones."""
    if n is None or n >= len(examples):
        return list(examples)
    return [examples[i] for i in np.linspace(0, len(examples) - 1, n).round().astype(int)]


def score_generation(
    base: BaseModel,
    packed: PackedAdapters,
    tokenizer: ChatTokenizer,
    examples: Mapping[int, Sequence[Example]],
    settings: GenerationSettings,
    names: Mapping[int, str] | None = None,
) -> dict[int, Generated]:
    """Let every subject (a slot, or ``BASE``) answer its examples, all in the same batches, and score the answers.

    Args:
        base: the base model.
        packed: the adapters on it.
        tokenizer: stops and decodes.
        examples: what each subject answers; ``settings.max_examples`` of them.
        settings: how.
        names: names each subject's examples in its score, so that scores on the same ones can be paired.
    """
    chosen = {subject: subset(many, settings.max_examples) for subject, many in examples.items()}
    prompts = [Prompt(subject, example.prompt) for subject, many in chosen.items() for example in many]
    budget = TokenBudget(settings.cache_tokens, "generation")
    answers = iter(
        generate(
            base,
            packed,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            stop=tokenizer.stop_ids,
            cache_budget=budget,
        )
    )
    results = {}
    for subject, many in chosen.items():
        ids = [next(answers) for _ in many]
        texts = [tokenizer.decode(each) for each in ids]
        values = [float(settings.metric(text, example)) for text, example in zip(texts, many, strict=True)]
        score = Score.mean(values, examples=(names or {}).get(subject, ""))
        results[subject] = Generated(score, tuple(many), tuple(texts), tuple(len(each) for each in ids))
    return results


def generation_scorer(
    base: BaseModel,
    packed: PackedAdapters,
    tokenizer: ChatTokenizer,
    settings: GenerationSettings,
    *,
    name: str = EXACT_MATCH,
    every: float | None = None,
) -> Scorer:
    """A scorer of generated answers to the validation prompts."""

    def score(tasks: Mapping[int, Task]) -> dict[int, Score]:
        examples = {subject: task.val for subject, task in tasks.items()}
        generated = score_generation(base, packed, tokenizer, examples, settings, _names(tasks))
        return {subject: each.score for subject, each in generated.items()}

    return Scorer(name, score, every)


def label_word_scorer(
    base: BaseModel,
    packed: PackedAdapters,
    tokenizer: ChatTokenizer,
    *,
    token_budget: int,
    every: float | None = None,
) -> Scorer:
    """A scorer of label-word accuracy on the validation examples.

    Raises:
        ValueError: when it is used, if an example has no label words.
    """
    budget = TokenBudget(token_budget, "evaluation")
    # The candidates of a data set are the same at every evaluation.
    made: dict[int, tuple[Task, list[Choice]]] = {}

    def score(tasks: Mapping[int, Task]) -> dict[int, Score]:
        for task in tasks.values():
            if id(task) not in made:
                made[id(task)] = (task, choices(tokenizer, task.val))
        by_subject = {subject: made[id(task)][1] for subject, task in tasks.items()}
        return label_word_accuracy(base, packed, by_subject, budget, _names(tasks))

    return Scorer(LABEL_ACCURACY, score, every)


def _names(tasks: Mapping[int, Task]) -> dict[int, str]:
    return {subject: task.name for subject, task in tasks.items()}
