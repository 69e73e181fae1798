"""Scores of many adapters, and of the base, on held-out examples: validation loss and label words.

Each forward carries one subject, whose sequences fill it up to the token budget. So the shapes, and
with them the bits, depend on nobody else: adapters of equal weights have equal losses, an adapter
with B = 0 has exactly the base's, and differences between trials are those of their weights. The
forwards of all subjects are queued before the first result is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from plora.data.microbatch import pack_eval
from plora.data.types import Example, Microbatch
from plora.models.attention import PackedSequences
from plora.models.base import BaseModel
from plora.modules.packed import PackedAdapters
from plora.training.budget import TokenBudget
from plora.training.loss import chunk_rows, token_losses
from plora.training.metrics import Score

BASE = -1
"""The subject that is no adapter: the base model alone."""


def validation_losses(
    base: BaseModel,
    packed: PackedAdapters,
    examples: Mapping[int, Sequence[Example]],
    budget: TokenBudget,
    names: Mapping[int, str] | None = None,
) -> dict[int, Score]:
    """Mean loss over label tokens of each subject, dropout off.

    Args:
        base: the base model.
        packed: the adapters on it.
        examples: what each subject (a slot, or ``BASE``) is scored on.
        budget: tokens of a forward.
        names: names each subject's examples in its score, so that scores on the same ones can be paired.

    Returns:
        For each subject the mean, its standard error over examples, and each example's mean loss.
    """
    scores = {}
    for subject, nll in _example_nll(base, packed, examples, budget).items():
        counts = np.array([example.n_labels for example in examples[subject]])
        scores[subject] = Score.mean((nll / counts).tolist(), counts.tolist(), examples=(names or {}).get(subject, ""))
    return scores


@dataclass(frozen=True, eq=False)
class Choice:
    """An example of a classification task by label words.

    Args:
        candidates: the example with each word as its answer; the labels are the word and its end of turn.
        correct: index of the right one.
    """

    candidates: tuple[Example, ...]
    correct: int


class MakesCandidates(Protocol):
    """A tokenizer that can put other answers into an example (``ChatTokenizer``)."""

    def candidates(self, example: Example, answers: Sequence[str]) -> list[Example]:
        """The example with each of ``answers`` in place of its own."""


def choices(tokenizer: MakesCandidates, examples: Sequence[Example]) -> list[Choice]:
    """Choices between the ``label_words`` in each example's fields.

    Raises:
        ValueError: if an example has no label words, or its answer is none of them.
    """
    made = []
    for example in examples:
        words = list(example.fields.get("label_words", ()))
        if example.answer not in words:
            raise ValueError(
                f"the answer {example.answer!r} is not among the label words {words}: "
                "label_words must list every answer of the data set"
            )
        made.append(Choice(tuple(tokenizer.candidates(example, words)), words.index(example.answer)))
    return made


def label_word_accuracy(
    base: BaseModel,
    packed: PackedAdapters,
    examples: Mapping[int, Sequence[Choice]],
    budget: TokenBudget,
    names: Mapping[int, str] | None = None,
) -> dict[int, Score]:
    """Share of examples whose right word, with its end of turn, has the highest summed log-likelihood.

    Arguments as `validation_losses`.
    """
    flat = {subject: [c for choice in many for c in choice.candidates] for subject, many in examples.items()}
    scores = {}
    for subject, nll in _example_nll(base, packed, flat, budget).items():
        ends = np.cumsum([len(choice.candidates) for choice in examples[subject]])
        right = [
            _is_right(part, choice) for part, choice in zip(np.split(nll, ends[:-1]), examples[subject], strict=True)
        ]
        scores[subject] = Score.mean(right, examples=(names or {}).get(subject, ""))
    return scores


def _is_right(nll: np.ndarray, choice: Choice) -> float:
    # An adapter that has become NaN has no opinion, and argmin would take the first word for it.
    return float(np.isfinite(nll).all() and int(np.argmin(nll)) == choice.correct)


def _example_nll(
    base: BaseModel, packed: PackedAdapters, examples: Mapping[int, Sequence[Example]], budget: TokenBudget
) -> dict[int, np.ndarray]:
    """Summed negative log-likelihood of each example's labels, float64 ``[n]`` by subject."""
    if not examples:
        return {}
    for subject, many in examples.items():
        if not many:
            raise ValueError(f"no examples to score {'the base' if subject == BASE else f'slot {subject}'} on")
    longest = max(len(example) for many in examples.values() for example in many)
    return budget.run(lambda tokens: _attempt_nll(base, packed, examples, tokens), longest)


def _attempt_nll(
    base: BaseModel, packed: PackedAdapters, examples: Mapping[int, Sequence[Example]], tokens: int
) -> dict[int, np.ndarray]:
    # Trials often share a validation set: its microbatches are made and moved once.
    microbatches: dict[int, list[Microbatch]] = {}
    queued: dict[int, list[torch.Tensor]] = {}
    for subject, many in examples.items():
        if id(many) not in microbatches:
            microbatches[id(many)] = [m.to(base.device) for m in pack_eval({0: many}, tokens)]
        queued[subject] = [_row_losses(base, packed, subject, m) for m in microbatches[id(many)]]
    return {
        subject: _sum_by_example(microbatches[id(examples[subject])], rows, len(examples[subject]))
        for subject, rows in queued.items()
    }


@torch.no_grad()
def _row_losses(base: BaseModel, packed: PackedAdapters, subject: int, microbatch: Microbatch) -> torch.Tensor:
    total = len(microbatch.tokens)
    counts = {} if subject == BASE else {subject: total}
    with packed.route(counts, base_tokens=total - sum(counts.values()), dropout=False):
        sequences = PackedSequences.from_lengths(microbatch.lengths, base.device)
        hidden = base.hidden_states(microbatch.tokens, microbatch.positions, sequences)
    rows = microbatch.label_rows
    return token_losses(
        base.logits, hidden, rows, microbatch.labels[rows], chunk=chunk_rows(base.spec.vocab_size, base.device)
    )


def _sum_by_example(microbatches: Sequence[Microbatch], rows: Sequence[torch.Tensor], n: int) -> np.ndarray:
    nll = np.zeros(n)
    for microbatch, losses in zip(microbatches, rows, strict=True):
        example_of_row = np.repeat([index for _, index in microbatch.sources], microbatch.lengths)
        example = example_of_row[microbatch.label_rows.cpu().numpy()]
        nll += np.bincount(example, weights=losses.double().cpu().numpy(), minlength=n)
    return nll
