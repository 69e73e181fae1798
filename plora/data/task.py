"""A data set section of the configuration becomes a task: examples to train on, to choose by and to score once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from plora.data.prompts import column_mistakes, kind_of, prompter
from plora.data.report import DataReport, SplitReport, marked, split_report
from plora.data.sections import Section, find_mistakes, merge, no_rows
from plora.data.sources import Rows, load_rows
from plora.data.tokenizer import ChatTokenizer, Encoded
from plora.data.types import Example, Task

VAL_FRACTION = 0.1
MOST_VAL_EXAMPLES = 500
_SHOWN_EXAMPLES = 3
# Rows of the training section are split with this after the sweep's seed, so that the stream of it is the split's own.
_SPLIT_STREAM = 1


def load_task(
    name: str,
    dataset_cfg: Section,
    val_cfg: Section | None,
    test_cfg: Section | None,
    tokenizer: ChatTokenizer,
    seed: int,
) -> tuple[Task, DataReport]:
    """Loads, prompts and tokenizes a data set.

    ``val_cfg`` and ``test_cfg`` inherit what they don't set from ``dataset_cfg``, except
    ``max_examples`` and the settings of the split-off: a search over the size of the training set
    must not change what chooses. Without ``val_cfg``, ``val_examples`` or ``val_fraction`` (a tenth, at most
    500 rows) of the training section's rows are split off with ``seed``; without ``test_cfg``,
    ``test_examples`` or ``test_fraction`` (none).

    Args:
        name: the task's name in the sweep.
        dataset_cfg: the ``dataset`` section.
        val_cfg: the ``dataset_val`` section.
        test_cfg: the ``dataset_test`` section.
        tokenizer: encodes the conversations.
        seed: the sweep's seed, zero or above.

    Raises:
        ValueError: if a setting is wrong, data are missing, no example is left, or validation or
            test rows are training rows too.
    """
    sections = merge(dataset_cfg, val_cfg, test_cfg)
    mistakes = find_mistakes(sections, look_at_rows=False)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    rows = _load_all(sections, seed)
    _refuse_shared_rows(rows)
    encoded = {
        where: _encode(where, sections.get(where, sections["dataset"]), r, tokenizer) for where, r in rows.items()
    }
    kept = {where: [e.example for e in each if e.example is not None] for where, each in encoded.items()}
    task = Task(name, kept["dataset"], kept["dataset_val"], kept.get("dataset_test", []))
    return task, _report(task, encoded, tokenizer)


def _load_all(sections: Mapping[str, Section], seed: int) -> dict[str, Rows]:
    """Each section's rows, with those split off the training section's."""
    rows = {}
    for where, section in sections.items():
        try:
            rows[where] = load_rows(section)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not rows[where].values:
            raise ValueError(f"{where}: {no_rows(section)}")
    rows = _split_off(rows, sections["dataset"], seed)
    for where in sections:
        limit = sections[where].get("max_examples")
        if limit is not None:
            rows[where] = rows[where].take(range(min(limit, len(rows[where].values))))
    return rows


def _split_off(rows: dict[str, Rows], section: Section, seed: int) -> dict[str, Rows]:
    """Takes missing validation and test rows from the training rows, which keep their order."""
    train = rows["dataset"]
    n = len(train.values)
    sizes = {}
    if "dataset_val" not in rows:
        sizes["dataset_val"] = _held_out_size(section, "val", n) or min(
            MOST_VAL_EXAMPLES, max(1, round(VAL_FRACTION * n))
        )
    if "dataset_test" not in rows:
        sizes["dataset_test"] = _held_out_size(section, "test", n)
    if sum(sizes.values()) >= n:
        raise ValueError(
            f"dataset: of {n} rows, {sum(sizes.values())} would be split off for validation and test, which leaves "
            "none to train on: give more rows, a smaller val_examples or test_examples, or a dataset_val section"
        )
    order = np.random.default_rng((seed, _SPLIT_STREAM)).permutation(n)
    taken = 0
    out = dict(rows)
    for where, size in sizes.items():
        if size:
            out[where] = train.take(np.sort(order[taken : taken + size]))
        taken += size
    out["dataset"] = train.take(np.sort(order[taken:]))
    return out


def _held_out_size(section: Section, part: str, n: int) -> int:
    fraction = section.get(f"{part}_fraction")
    if fraction is not None:
        return max(1, round(fraction * n))
    return int(section.get(f"{part}_examples") or 0)


def _refuse_shared_rows(rows: Mapping[str, Rows]) -> None:
    train = set(rows["dataset"].places or ())
    for where in ("dataset_val", "dataset_test"):
        shared = len(train.intersection(rows[where].places or ())) if where in rows else 0
        if shared:
            raise ValueError(
                f"{where}: {shared} of its {len(rows[where].values)} rows are training rows too, so its scores would "
                "mean nothing: leave them out of dataset, e.g. split: train[:-500] beside train[-500:]"
            )


def _encode(where: str, section: Section, rows: Rows, tokenizer: ChatTokenizer) -> list[Encoded]:
    columns = list(rows.values[0])
    kind = kind_of(section, columns)
    mistakes = column_mistakes(section, kind, columns, where)
    if mistakes:
        raise ValueError("\n".join(mistakes))
    to_prompt = prompter(section, kind, columns)
    try:
        prompted = [to_prompt(row) for row in rows.values]
        answered = [p for p in prompted if p.messages]
        encoded = tokenizer.encode_all(
            [p.messages for p in answered],
            fields=[p.fields for p in answered],
            train_on=section.get("train_on", "all"),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    unanswered = Encoded(None, "no_labels", np.empty(0, dtype=np.int32))
    encoded += [unanswered] * (len(prompted) - len(answered))
    if not any(e.example for e in encoded):
        counts = split_report(where, encoded)
        raise ValueError(
            f"{where}: none of its {len(encoded)} examples can be used: {counts.too_long} are longer than max_seq_len "
            f"{tokenizer.max_seq_len}, {counts.no_labels} have no answer within it"
        )
    return encoded


def _report(task: Task, encoded: Mapping[str, list[Encoded]], tokenizer: ChatTokenizer) -> DataReport:
    names = {"dataset": "train", "dataset_val": "val", "dataset_test": "test"}
    splits: list[SplitReport] = [split_report(names[w], encoded[w]) for w in names if w in encoded]
    shown: list[Example] = task.train[:_SHOWN_EXAMPLES]
    return DataReport(task.name, tuple(splits), tuple(marked(tokenizer, e) for e in shown))
