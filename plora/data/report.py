"""What a task's data look like, shown before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from plora.data.tokenizer import ChatTokenizer, Encoded
from plora.data.types import IGNORE_INDEX, Example

LABEL_START, LABEL_END = "⟦", "⟧"
_PERCENTILES = (50, 90, 99, 100)
_LONGEST_SHOWN = 600


@dataclass(frozen=True)
class SplitReport:
    """Counts and lengths of one split.

    Args:
        name: ``train``, ``val`` or ``test``.
        kept: examples in use, cut ones included.
        truncated: those of them that were cut to ``max_seq_len``.
        too_long: examples dropped as too long.
        no_labels: examples dropped because nothing of them could be trained on or scored.
        percentiles: p50, p90, p99 and maximum of the tokens of all examples, dropped ones included.
        label_tokens: labelled tokens of the kept examples.
    """

    name: str
    kept: int
    truncated: int
    too_long: int
    no_labels: int
    percentiles: tuple[int, ...]
    label_tokens: int


@dataclass(frozen=True)
class DataReport:
    """A task's splits and its first examples as text; ``str`` gives the whole."""

    task: str
    splits: tuple[SplitReport, ...]
    examples: tuple[str, ...]

    def __str__(self) -> str:
        header = ("split", "kept", "truncated", "too long", "no labels", "labels", "p50", "p90", "p99", "max")
        table: list[tuple[str, ...]] = [header]
        for s in self.splits:
            counts = (s.kept, s.truncated, s.too_long, s.no_labels, s.label_tokens, *s.percentiles)
            table.append((s.name, *(str(c) for c in counts)))
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        lines = [f"data set {self.task!r} (lengths in tokens; dropped: too long, no labels)"]
        lines += ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        for number, text in enumerate(self.examples, start=1):
            lines.append(f"example {number} (the labelled part stands in {LABEL_START}{LABEL_END}):")
            lines += [f"  | {line}" for line in text.splitlines()]
        return "\n".join(lines)


def split_report(name: str, encoded: Sequence[Encoded]) -> SplitReport:
    """Counts what became of a split's examples."""
    outcomes = Counter(e.outcome for e in encoded)
    examples = [e.example for e in encoded if e.example is not None]
    lengths = [len(e.ids) for e in encoded] or [0]
    return SplitReport(
        name=name,
        kept=len(examples),
        truncated=outcomes["truncated"],
        too_long=outcomes["too_long"],
        no_labels=outcomes["no_labels"],
        percentiles=tuple(int(p) for p in np.percentile(lengths, _PERCENTILES, method="higher")),
        label_tokens=sum(e.n_labels for e in examples),
    )


def marked(tokenizer: ChatTokenizer, example: Example) -> str:
    """The example as text with special tokens and the labelled parts in brackets; long parts are shortened."""
    ids = np.append(example.inputs, example.labels[-1:])
    labelled = np.concatenate([[False], example.labels != IGNORE_INDEX])
    edges = [0, *(np.flatnonzero(np.diff(labelled)) + 1).tolist(), len(ids)]
    text = ""
    for first, last in pairwise(edges):
        part = _shorten(tokenizer.decode(ids[first:last], skip_special_tokens=False))
        text += f"{LABEL_START}{part}{LABEL_END}" if labelled[first] else part
    return text


def _shorten(text: str) -> str:
    if len(text) <= _LONGEST_SHOWN:
        return text
    half = _LONGEST_SHOWN // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters) ... {text[-half:]}"
