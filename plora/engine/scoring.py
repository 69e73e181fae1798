"""The scores that rank: after training, from the saved adapters, and once on the test data."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from plora.checkpoint.jsonl import JsonLines
from plora.checkpoint.layout import SweepLayout
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
from plora.training.records import VAL_LOSS, Scorer
from plora.training.scorers import (
    LABEL_ACCURACY,
    GenerationSettings,
    generation_scorer,
    label_word_scorer,
    score_generation,
)

log = logging.getLogger(__name__)


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
    trial: Trial | None


class Objective:
    """The sweep's objective: what measures it, and when.

    Args:
        config: the sweep's.
        token_budget: tokens of a forward pass in evaluation.
    """

    def __init__(self, config: SweepConfig, token_budget: int) -> None:
        self.name = config.objective.metric
        self.maximize = config.objective.direction == "maximize"
        self.generation = config.evaluation.generation
        self.token_budget = config.evaluation.batch_tokens or token_budget
        self.needs_generation = self.name not in (VAL_LOSS, LABEL_ACCURACY)

    def settings(self, generation: GenerationConfig) -> GenerationSettings:
        """How answers are generated and compared."""
        return GenerationSettings(
            metric=self._metric(generation),
            max_new_tokens=generation.max_new_tokens,
            max_examples=generation.max_examples,
        )

    def job_scorers(self, base: BaseModel, packed: PackedAdapters, tokenizer: ChatTokenizer) -> list[Scorer]:
        """What a job measures beside the validation loss: label words, and generated answers on the way."""
        scorers = []
        if self.name == LABEL_ACCURACY:
            scorers.append(label_word_scorer(base, packed, tokenizer, token_budget=self.token_budget))
        if self.generation is not None and self.generation.every is not None:
            every, settings = self.generation.every, self.settings(self.generation)
            scorers.append(generation_scorer(base, packed, tokenizer, settings, name=self.name, every=every))
        return scorers

    def _metric(self, generation: GenerationConfig) -> Metric:
        if self.name not in ("exact_match", VAL_LOSS, LABEL_ACCURACY):
            return load_metric(self.name)
        answer = generation.answer
        return load_metric(answer) if answer is not None and is_dotted_name(answer) else exact_match(answer)


def is_dotted_name(answer: str) -> bool:
    """Whether ``answer`` names a callable (``package.function``) rather than being a regular expression."""
    return "." in answer and all(part.isidentifier() for part in answer.split("."))


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
        """The objective of each subject on ``split``, by subject name; generated answers are written beside."""
        trials = [subject.trial for subject in subjects if subject.trial is not None]
        bases = [subject for subject in subjects if subject.trial is None]
        with self._loaded(trials) as (packed, slots):
            first = {slots[subject.name]: subject for subject in subjects if subject.trial is not None}
            # The base is one subject to a pass: on further data sets it is scored by itself.
            passes = [first | {BASE: base} if i == 0 else {BASE: base} for i, base in enumerate(bases)] or [first]
            return {name: score for each in passes for name, score in self._score(packed, each, split).items()}

    def _score(self, packed: PackedAdapters, subjects: Mapping[int, Subject], split: str) -> dict[str, Score]:
        tasks = {slot: _on_split(subject.task, split) for slot, subject in subjects.items()}
        names = {slot: f"{task.name}/{split}" for slot, task in tasks.items()}
        examples = {slot: task.val for slot, task in tasks.items()}
        objective = self._objective
        if objective.needs_generation:
            assert objective.generation is not None, "checked with the configuration"
            settings = objective.settings(objective.generation)
            if split == "test":
                settings = replace(settings, max_examples=None)
            generated = score_generation(self._base, packed, self._tokenizer, examples, settings, names)
            for slot, each in generated.items():
                self._write_predictions(subjects[slot].name, split, each)
            return {subjects[slot].name: each.score for slot, each in generated.items()}
        if objective.name == LABEL_ACCURACY:
            scorer = label_word_scorer(
                self._base, packed, self._tokenizer, token_budget=objective.token_budget
            )
            found = scorer.score(tasks)
        else:
            budget = TokenBudget(objective.token_budget, "evaluation")
            found = validation_losses(self._base, packed, examples, budget, names)
        return {subjects[slot].name: score for slot, score in found.items()}

    def _write_predictions(self, name: str, split: str, generated) -> None:  # type: ignore[no-untyped-def]
        path = self._layout.predictions(name, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        with JsonLines(path) as lines:
            rows = zip(
                generated.examples, generated.predictions, generated.score.per_example, generated.tokens, strict=True
            )
            for example, prediction, score, n_tokens in rows:
                prompt = self._tokenizer.decode(example.prompt)
                lines.append(
                    {"prompt": prompt, "prediction": prediction, "reference": example.answer, "score": score,
                     "new_tokens": n_tokens}
                )  # fmt: skip

    @contextmanager
    def _loaded(self, trials: Sequence[Trial]) -> Iterator[tuple[PackedAdapters, dict[str, int]]]:
        packed = pack_adapters(self._base.module, [trial.adapter for trial in trials])
        try:
            slots = {trial.name: slot for slot, trial in enumerate(trials)}
            for trial in trials:
                packed.adapters[slots[trial.name]].load_factors(load_factors(self._layout, trial))
            yield packed, slots
        finally:
            packed.unpack(self._base.module)


def base_subjects(tasks: Mapping[str, Task]) -> list[Subject]:
    """The base model on each distinct data set."""
    distinct = list({id(task): task for task in tasks.values()}.values())
    single = len(distinct) == 1
    return [Subject(BASE_NAME if single else _file_name(f"{BASE_NAME}-{task.name}"), task, None) for task in distinct]


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name)


def _on_split(task: Task, split: str) -> Task:
    """The task with ``split``'s examples where scorers look for them."""
    return task if split == "val" else replace(task, val=task.test)
