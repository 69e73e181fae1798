"""The scores that rank: while training, from the saved adapters after it, and once on the test data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from plora.checkpoint.jsonl import JsonLines
from plora.checkpoint.layout import SweepLayout
from plora.config.checks import is_dotted_name
from plora.config.schema import GenerationConfig, SweepConfig
from plora.data.tokenizer import ChatTokenizer
from plora.data.types import Task
from plora.engine.recorder import load_factors
from plora.models.base import BaseModel
from plora.modules.packed import PackedAdapters, pack_adapters
from plora.report.results import BASE as BASE_NAME
from plora.search.trial import Trial
from plora.training.budget import TokenBudget
from plora.training.evaluation import BASE, validation_losses
from plora.training.metrics import Metric, Score, exact_match, load_metric
from plora.training.records import Scorer
from plora.training.scorers import (
    EXACT_MATCH,
    LABEL_ACCURACY,
    Generated,
    GenerationSettings,
    generation_scorer,
    label_word_scorer,
    score_generation,
)


@dataclass(frozen=True)
class Subject:
    """Who is scored on what: a trial's adapter, or the base model.

    Args:
        name: of the trial, or ``base`` (with the data set's name where a sweep has several).
        task: the data.
        trial: None for the base model.
    """

    name: str
    task: Task
    trial: Trial | None = None


class Objective:
    """The sweep's objective: what measures it, and when.

    Args:
        config: the sweep's.
        token_budget: tokens of a forward pass in evaluation.
    """

    def __init__(self, config: SweepConfig, token_budget: int) -> None:
        self._config = config.objective
        self.name = config.objective.metric
        self.maximize = config.objective.direction == "maximize"
        self.needs_answers = config.objective.needs_answers
        self.generation = config.evaluation.generation
        self.token_budget = config.evaluation.batch_tokens or token_budget

    def settings(self, generation: GenerationConfig) -> GenerationSettings:
        """How answers are generated and compared."""
        return GenerationSettings(
            metric=self._metric(generation.answer),
            max_new_tokens=generation.max_new_tokens,
            max_examples=generation.max_examples,
        )

    def job_scorers(self, base: BaseModel, packed: PackedAdapters, tokenizer: ChatTokenizer) -> list[Scorer]:
        """What a job measures beside the validation loss: label words, and generated answers on the way."""
        scorers = []
        if self.name == LABEL_ACCURACY:
            scorers.append(label_word_scorer(base, packed, tokenizer, token_budget=self.token_budget))
        if self.generation is not None and self.generation.every is not None:
            name, every = self.name if self.needs_answers else EXACT_MATCH, self.generation.every
            scorers.append(
                generation_scorer(base, packed, tokenizer, self.settings(self.generation), name=name, every=every)
            )
        return scorers

    def _metric(self, answer: str | None) -> Metric:
        if self._config.is_callable:
            return load_metric(self.name)
        return load_metric(answer) if answer is not None and is_dotted_name(answer) else exact_match(answer)


class SavedAdapters:
    """Scores adapters of finished trials, loaded from their states beside the base.

    Args:
        base: the base model, not packed.
        tokenizer: of the prompts.
        layout: where states lie and predictions go.
        objective: what is measured.
    """

    def __init__(self, base: BaseModel, tokenizer: ChatTokenizer, layout: SweepLayout, objective: Objective) -> None:
        self._base, self._tokenizer, self._layout, self._objective = base, tokenizer, layout, objective

    def score(self, subjects: Sequence[Subject], split: str) -> dict[str, Score]:
        """The objective of each subject on ``split`` (``val`` or ``test``), by subject name.

        Generated answers are written to the subject's predictions file.
        """
        scores: dict[str, Score] = {}
        trials = [subject.trial for subject in subjects if subject.trial is not None]
        with self._loaded(trials) as packed:
            for by_slot in _passes(subjects):
                found = self._score(packed, by_slot, split)
                scores |= {by_slot[slot].name: score for slot, score in found.items()}
        return scores

    def _score(self, packed: PackedAdapters, subjects: Mapping[int, Subject], split: str) -> Mapping[int, Score]:
        objective = self._objective
        tasks = {slot: _on_split(subject.task, split) for slot, subject in subjects.items()}
        if objective.needs_answers:
            return self._score_answers(packed, subjects, tasks, split)
        if objective.name == LABEL_ACCURACY:
            budget = objective.token_budget
            return label_word_scorer(self._base, packed, self._tokenizer, token_budget=budget).score(tasks)
        examples = {slot: task.val for slot, task in tasks.items()}
        return validation_losses(
            self._base, packed, examples, TokenBudget(objective.token_budget, "evaluation"), _names(tasks)
        )

    def _score_answers(
        self, packed: PackedAdapters, subjects: Mapping[int, Subject], tasks: Mapping[int, Task], split: str
    ) -> dict[int, Score]:
        assert self._objective.generation is not None, "checked with the configuration"
        settings = self._objective.settings(self._objective.generation)
        if split == "test":
            settings = replace(settings, max_examples=None)
        examples = {slot: task.val for slot, task in tasks.items()}
        generated = score_generation(self._base, packed, self._tokenizer, examples, settings, _names(tasks))
        for slot, each in generated.items():
            self._write_predictions(subjects[slot].name, split, each)
        return {slot: each.score for slot, each in generated.items()}

    def _write_predictions(self, name: str, split: str, generated: Generated) -> None:
        answers = zip(
            generated.examples, generated.predictions, generated.score.per_example, generated.tokens, strict=True
        )
        with JsonLines(self._layout.predictions(name, split)) as lines:
            for example, prediction, score, n_tokens in answers:
                row = {"prompt": self._tokenizer.decode(example.prompt), "prediction": prediction}
                lines.append(row | {"reference": example.answer, "score": score, "new_tokens": n_tokens})

    @contextmanager
    def _loaded(self, trials: Sequence[Trial]) -> Iterator[PackedAdapters]:
        packed = pack_adapters(self._base.module, [trial.adapter for trial in trials])
        try:
            for slot, trial in enumerate(trials):
                packed.adapters[slot].load_factors(load_factors(self._layout, trial))
            yield packed
        finally:
            packed.unpack(self._base.module)


def base_subjects(tasks: Mapping[str, Task]) -> list[Subject]:
    """The base model on each distinct data set."""
    distinct = list({id(task): task for task in tasks.values()}.values())
    if len(distinct) == 1:
        return [Subject(BASE_NAME, distinct[0])]
    return [Subject(_file_name(f"{BASE_NAME}-{task.name}"), task) for task in distinct]


def _passes(subjects: Sequence[Subject]) -> list[dict[int, Subject]]:
    """The subjects by slot; as the base is one subject to a pass, further data sets of its take passes of their own."""
    adapters = dict(enumerate(subject for subject in subjects if subject.trial is not None))
    bases = [{BASE: subject} for subject in subjects if subject.trial is None]
    return [adapters | first for first in bases[:1]] + bases[1:] if bases else [adapters]


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name)


def _on_split(task: Task, split: str) -> Task:
    """The task with ``split``'s examples where scorers look for them, named after it so that only like is paired."""
    assert split in ("val", "test"), split
    return task if split == "val" else replace(task, name=f"{task.name}/test", val=task.test)


def _names(tasks: Mapping[int, Task]) -> dict[int, str]:
    return {slot: task.name for slot, task in tasks.items()}
