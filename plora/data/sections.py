"""The ``dataset``, ``dataset_val`` and ``dataset_test`` sections: what they inherit, and the mistakes in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from plora.data.mistakes import unknown_keys
from plora.data.prompts import COMPONENTS, KEYS, SYSTEM_KEYS, column_mistakes, kind_of, setting_mistakes
from plora.data.sources import SOURCE_KEYS, TASK_KEYS, component_of, is_builtin, peek
from plora.data.splits import parse_split

Section = Mapping[str, Any]

HELD_OUT_KEYS = ("val_examples", "val_fraction", "test_examples", "test_fraction")


def check(
    dataset_cfg: Section, val_cfg: Section | None = None, test_cfg: Section | None = None, where: str = "dataset"
) -> list[str]:
    """The mistakes that can be found without tokenizing, each as ``section.key: advice``.

    Local files are opened, small ones read; of the hub only the description is asked for.

    Args:
        dataset_cfg: the ``dataset`` section.
        val_cfg: the ``dataset_val`` section.
        test_cfg: the ``dataset_test`` section.
        where: what the ``dataset`` section is called in the messages.
    """
    try:
        sections = merge(dataset_cfg, val_cfg, test_cfg)
    except ValueError as error:
        return [str(error)]
    mistakes = find_mistakes(sections, look_at_rows=True)
    return [re.sub(r"^dataset(?=[.:])", lambda _: where, mistake) for mistake in mistakes]


def find_mistakes(sections: Mapping[str, Section], *, look_at_rows: bool) -> list[str]:
    """The mistakes of all sections; one that is only inherited is told once."""
    mistakes: list[str] = []
    for where, section in sections.items():
        keys, blocking = _key_mistakes(section, where, sections), _meaning_mistakes(section, where)
        rows = _row_mistakes(section, where) if look_at_rows and not blocking else []
        own = [*keys, *blocking, *rows]
        mistakes += [m for m in own if f"dataset{m.removeprefix(where)}" not in mistakes]
    return mistakes


def merge(dataset_cfg: Section, val_cfg: Section | None, test_cfg: Section | None) -> dict[str, dict[str, Any]]:
    """The sections with what they inherit, by their key in the configuration.

    Raises:
        ValueError: if one is not a mapping.
    """
    given = {"dataset": dataset_cfg, "dataset_val": val_cfg, "dataset_test": test_cfg}
    merged: dict[str, dict[str, Any]] = {}
    for where, section in given.items():
        if section is None and where != "dataset":
            continue
        if not isinstance(section, Mapping):
            raise ValueError(f"{where}: must be a mapping of settings, got {section!r}")
        inherited: dict[str, Any] = {}
        if where != "dataset":
            inherited = _inherited(merged["dataset"], section)
        merged[where] = {**inherited, **section}
    return merged


def _inherited(dataset: Section, section: Section) -> dict[str, Any]:
    """What a validation or test section takes over; another source does not take over how to read the first."""
    dropped: set[str] = {"max_examples", *HELD_OUT_KEYS}
    if section.get("_component_") not in (None, dataset.get("_component_")):
        return {}
    if "source" in section and section["source"] != dataset.get("source"):
        dropped |= set(SOURCE_KEYS)
    elif "data_files" in section:
        dropped.add("split")
    return {k: v for k, v in dataset.items() if k not in dropped}


def _meaning_mistakes(section: Section, where: str) -> list[str]:
    """Mistakes that leave open which rows are meant, or what of them."""
    component = component_of(section)
    found = setting_mistakes(section, COMPONENTS.get(component, "other"), where)
    if is_builtin(section):
        if not section.get("source") and not section.get("data_files"):
            found.append(f"{where}.source: is missing; give a file, a folder or the id of a data set on the hub")
        try:
            parse_split(section.get("split") or "train")
        except ValueError as error:
            found.append(f"{where}.split: {error}")
    return found


def _key_mistakes(section: Section, where: str, sections: Mapping[str, Section]) -> list[str]:
    """Unknown keys, numbers out of range, and sections that contradict each other."""
    found = _number_mistakes(section, where)
    if is_builtin(section):
        own = KEYS[COMPONENTS[component_of(section)]]
        found += unknown_keys(section, ("_component_", *SOURCE_KEYS, *TASK_KEYS, *SYSTEM_KEYS, *own), where)
    if where == "dataset":
        return found + [
            f"dataset.{key}: has no effect beside {other}; remove one of them"
            for other, keys in (("dataset_val", HELD_OUT_KEYS[:2]), ("dataset_test", HELD_OUT_KEYS[2:]))
            for key in keys
            if other in sections and section.get(key) is not None
        ]
    found += [f"{where}.{key}: belongs to the dataset section" for key in HELD_OUT_KEYS if section.get(key) is not None]
    ignored = ("max_examples", "shuffle_seed")
    if _without(section, ignored) == _without(sections["dataset"], (*ignored, *HELD_OUT_KEYS)):
        found.append(f"{where}: reads the same rows as dataset; give it its own split or source, or remove it")
    return found


def _without(section: Section, keys: tuple[str, ...]) -> dict[str, Any]:
    return {k: v for k, v in section.items() if k not in keys}


def _number_mistakes(section: Section, where: str) -> list[str]:
    found = []
    for key, least in (("max_examples", 1), ("shuffle_seed", 0), ("val_examples", 1), ("test_examples", 1)):
        value = section.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            found.append(f"{where}.{key}: must be a whole number of at least {least}, got {value!r}")
    for part in ("val", "test"):
        value = section.get(f"{part}_fraction")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1):
            found.append(f"{where}.{part}_fraction: must lie between 0 and 1, got {value!r}")
        if value is not None and section.get(f"{part}_examples") is not None:
            found.append(f"{where}.{part}_fraction: give it or {part}_examples, not both")
    return found


def _row_mistakes(section: Section, where: str) -> list[str]:
    """Mistakes that only a look at the data shows."""
    try:
        columns, n_rows = peek(section)
    except ValueError as error:
        return [f"{where}: {error}"]
    if n_rows == 0:
        return [f"{where}: {no_rows(section)}"]
    return column_mistakes(section, kind_of(section, columns), columns, where) if columns else []


def no_rows(section: Section) -> str:
    """What to say of a section without rows."""
    source = section.get("source") or section.get("data_files") or component_of(section)
    return f"{source!r} has no rows (split {section.get('split') or 'train'!r})"
