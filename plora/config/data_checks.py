"""Checks of the data sets: those at hand when the configuration is read, the others just before the sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from plora.config.mistakes import Findings
from plora.config.schema import DataSections, SweepConfig, data_sections


def note_data_at_hand(
    datasets: Mapping[str, Mapping[str, Any]],
    val: Mapping[str, Any] | None,
    test: Mapping[str, Any] | None,
    findings: Findings,
) -> None:
    """Note what is wrong with data sets that can be looked at without a network: local files, plora's own."""
    from plora.data import check

    for name, settings in datasets.items():
        sections = data_sections(settings, val, test)
        if not settings or not _at_hand(sections):
            continue
        for problem in check(*sections, where=_path(name)):
            path, _, advice = problem.partition(": ")
            if path not in {mistake.path for mistake in findings.mistakes}:
                findings.add(path, advice)


def data_problems(config: SweepConfig) -> list[str]:
    """What is wrong with the data that the trials of ``config`` use, the hub's description of it included."""
    from plora.data import check

    variants: list[tuple[str, DataSections]] = []
    for trial in config.trials:
        variant = (_path(trial.dataset), config.data_of(trial))
        if variant not in variants:
            variants.append(variant)
    return _unique(problem for where, sections in variants for problem in check(*sections, where=where))


def _at_hand(sections: DataSections) -> bool:
    from plora.data.files import is_local
    from plora.data.sources import component_of, is_builtin
    from plora.data.task import merge

    try:
        merged = merge(*sections)
    except ValueError:
        return False  # a section that is no mapping, noted where it was read
    return all(
        is_local(section.get("source"), section.get("data_files"))
        if is_builtin(section)
        else component_of(section).startswith("plora.")
        for section in merged.values()
    )


def _path(name: str) -> str:
    return "dataset" if name == "dataset" else f"datasets.{name}"


def _unique(problems: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(problems))
