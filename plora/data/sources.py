"""Rows of a data set section: local files, the hub, or a function that returns rows."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from plora.data import files, hub
from plora.data.mistakes import nearest
from plora.data.prompts import COMPONENTS, KEYS, SYSTEM_KEYS
from plora.data.splits import parse_split

Row = Mapping[str, Any]

DEFAULT_COMPONENT = "plora.data.instruct_dataset"
SOURCE_KEYS = ("source", "name", "split", "data_files", "revision")
TASK_KEYS = ("max_examples", "shuffle_seed", "val_examples", "val_fraction", "test_examples", "test_fraction")
# Settings that plora applies to the rows of any component instead of passing them on.
_OURS = ("_component_", *TASK_KEYS, *SYSTEM_KEYS, *(key for keys in KEYS.values() for key in keys))


@dataclass(frozen=True)
class Rows:
    """Rows with where each came from, so that two sections can be told to share rows.

    Args:
        values: the rows.
        places: for each row a key that equals another's only if they are the same row of the same
            source; None if the source does not say.
    """

    values: list[Row]
    places: list[Hashable] | None

    def take(self, indices: Iterable[int]) -> Rows:
        """The rows at ``indices``, in that order."""
        chosen = [int(i) for i in indices]
        places = None if self.places is None else [self.places[i] for i in chosen]
        return Rows([self.values[i] for i in chosen], places)

    def shuffled(self, seed: int) -> Rows:
        """The rows in a random order."""
        return self.take(np.random.default_rng(seed).permutation(len(self.values)))


def component_of(section: Mapping[str, Any]) -> str:
    """The section's component; by default prompts and answers in two columns."""
    return str(section.get("_component_") or DEFAULT_COMPONENT)


def is_builtin(section: Mapping[str, Any]) -> bool:
    """Whether the rows come from a file or the hub rather than from a function."""
    return component_of(section) in COMPONENTS


def load_rows(section: Mapping[str, Any]) -> Rows:
    """All rows of a section, shuffled if it says so.

    Raises:
        ValueError: if they cannot be had; the message says why and what to do.
    """
    if not is_builtin(section):
        rows = Rows(_as_rows(_call(section)), None)
    elif files.is_local(section.get("source"), section.get("data_files")):
        rows = _local_rows(section)
    else:
        rows = _hub_rows(section)
    seed = section.get("shuffle_seed")
    return rows if seed is None else rows.shuffled(seed)


def _local_rows(section: Mapping[str, Any]) -> Rows:
    found = files.find(section.get("source"), section.get("data_files"))
    values: list[Row] = []
    places: list[Hashable] = []
    for part in parse_split(section.get("split") or "train"):
        paths = files.choose(found, part.name)
        whole = [(row, (str(path), i)) for path in paths for i, row in enumerate(files.read(path))]
        chosen = [whole[i] for i in part.rows(len(whole))]
        values += [row for row, _ in chosen]
        places += [place for _, place in chosen]
    return Rows(values, places)


def _hub_rows(section: Mapping[str, Any]) -> Rows:
    values: list[Row] = []
    places: list[Hashable] = []
    for part in parse_split(section.get("split") or "train"):
        whole = hub.load_split(section, part.name)
        chosen = part.rows(len(whole))
        values += whole.select(chosen).to_list()
        places += [(section["source"], section.get("name"), part.name, i) for i in chosen]
    return Rows(values, places)


def peek(section: Mapping[str, Any]) -> tuple[list[str], int | None]:
    """Columns and number of rows (None: not known without loading them), as cheaply as they can be had.

    Raises:
        ValueError: as ``load_rows``.
    """
    if not is_builtin(section):
        component, arguments = resolve(section)
        if component.__module__.split(".")[0] != "plora":
            return [], None
        rows = _as_rows(component(**arguments))
        return list(rows[0]) if rows else [], len(rows)
    parts = parse_split(section.get("split") or "train")
    if not files.is_local(section.get("source"), section.get("data_files")):
        splits, columns = hub.describe(section)
        for part in parts:
            if splits and part.name not in splits:
                raise ValueError(hub.split_mistake(part.name, splits))
        return columns, None
    found = files.find(section.get("source"), section.get("data_files"))
    columns = []
    total: int | None = 0
    for part in parts:
        sizes = []
        for path in files.choose(found, part.name):
            own, size = files.peek(path)
            columns = columns or own
            sizes.append(size)
        known = [s for s in sizes if s is not None]
        total = total + len(part.rows(sum(known))) if total is not None and len(known) == len(sizes) else None
    return columns, total


def resolve(section: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A section's own function and its arguments.

    Raises:
        ValueError: if it cannot be imported or does not take the section's settings.
    """
    path = component_of(section)
    module_name, _, name = path.rpartition(".")
    try:
        component = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the component {path!r} cannot be imported ({error}): {nearest(path, [*COMPONENTS, 'plora.data.dates'])}, "
            "or the dotted path of a function of yours that returns rows (its folder on PYTHONPATH)"
        ) from error
    arguments = {k: v for k, v in section.items() if k not in _OURS}
    signature = inspect.signature(component)
    for parameter in ("tokenizer", "model_transform"):
        # torchtune's builders want a tokenizer; their rows are read before it would be used.
        if parameter in signature.parameters:
            arguments.setdefault(parameter, None)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = [n for n, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD]
        raise ValueError(f"{path} does not take these settings ({error}); it takes: {', '.join(names)}") from error
    return component, arguments


def _call(section: Mapping[str, Any]) -> Any:
    component, arguments = resolve(section)
    return component(**arguments)


def _as_rows(result: Any) -> list[Row]:
    transform, data = getattr(result, "_message_transform", None), getattr(result, "_data", None)
    if transform is not None and data is not None:
        return [_from_torchtune(transform(row)) for row in data]
    if not isinstance(result, Iterable) or isinstance(result, str | Mapping):
        raise ValueError(f"a data set component must return rows (mappings of columns), got {type(result).__name__}")
    rows = list(result)
    for row in rows[:1]:
        if not isinstance(row, Mapping):
            raise ValueError(f"a data set component must return rows (mappings of columns), got {str(row)[:80]!r}")
    return rows


def _from_torchtune(sample: Mapping[str, Any]) -> Row:
    """A row with ``messages`` from torchtune's message objects."""
    messages = [{"role": m.role, "content": m.text_content} for m in sample["messages"]]
    return {"messages": [m for m in messages if m["content"] or m["role"] != "system"]}
