"""Reads ``trial:`` and ``search:`` and draws the trials of the sweep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plora.config import checks
from plora.config.components import COMPONENT
from plora.config.mistakes import Findings
from plora.config.schema import SearchConfig
from plora.config.section import Section
from plora.search.samplers import LIST, MOST_TRIALS, drawn_trials, list_trials, make_sampler
from plora.search.settings import DEFAULTS, merge, read_settings
from plora.search.space import decode, grid_values, parse_space
from plora.search.trial import Trial

_SEARCH_KEYS = ("sampler", "n_trials", "space", "trials")


def read_trials(root: Section, seed: int, datasets: Mapping[str, Any]) -> tuple[SearchConfig, tuple[Trial, ...]]:
    """The search section and the trials that it makes, the default one first.

    Args:
        root: the whole configuration.
        seed: of the sampler, and of trials that set none.
        datasets: the data sets' names.
    """
    findings = root.findings
    before = len(findings.mistakes)
    section = root.section("search", _SEARCH_KEYS)
    default = _default_settings(root, seed, datasets)
    sampler, options = _sampler(section)
    space = parse_space(section.section("space", None).raw, section.at("space"), findings)
    entries = _entries(section)
    n_trials = section.read("n_trials", checks.optional(checks.whole(1, MOST_TRIALS)), None)
    search = SearchConfig(sampler=sampler, sampler_options=options, n_trials=n_trials, space=space)
    _note_dataset_names(default, search, entries, datasets, findings)
    _note_contradictions(section, search, len(entries))
    if len(findings.mistakes) > before:
        return search, ()
    if sampler == LIST:
        return search, tuple(list_trials(default, entries, findings))
    made = make_sampler(sampler, options, space, seed, findings)
    if made is None:
        return search, ()
    wanted = 1 if not space else n_trials
    return search, tuple(drawn_trials(default, space, made, wanted, findings))


def _default_settings(root: Section, seed: int, datasets: Mapping[str, Any]) -> dict[str, Any]:
    given = read_settings(root.section("trial", None).raw, "trial", root.findings)
    first = next(iter(datasets), "dataset")
    return merge({**DEFAULTS, "seed": seed, "dataset": first}, given)


def _sampler(section: Section) -> tuple[str, dict[str, Any]]:
    usual = LIST if "trials" in section else "random"
    raw = section.raw.get("sampler")
    if not isinstance(raw, Mapping):
        return section.read("sampler", checks.text, usual), {}
    chosen = section.section("sampler", None)
    component = chosen.read(COMPONENT, checks.text) or usual
    return component, {key: value for key, value in chosen.raw.items() if key != COMPONENT}


def _entries(section: Section) -> list[dict[str, Any]]:
    raw = section.raw.get("trials")
    if raw is None:
        return []
    if not isinstance(raw, list) or not all(isinstance(entry, Mapping) for entry in raw):
        section.findings.add(section.at("trials"), "must be a list such as [{lr: 1e-4}, {lr: 3e-4, rank: 8}]", raw)
        return []
    return [read_settings(entry, f"search.trials[{index}]", section.findings) for index, entry in enumerate(raw)]


def _note_contradictions(section: Section, search: SearchConfig, n_entries: int) -> None:
    findings, listed = section.findings, search.sampler == LIST
    if listed and "trials" not in section:
        findings.add(section.at("trials"), "is missing: the list sampler takes its trials from here")
    if "trials" in section and not listed:
        findings.add(section.at("trials"), f"cannot be used with sampler {search.sampler}: remove one of them")
    if "trials" in section and "space" in section:
        findings.add(section.at("space"), "cannot be given beside search.trials, which lists every trial: remove one")
    if listed:
        if search.n_trials not in (None, n_entries + 1):
            advice = f"search.trials lists {n_entries} beside the default trial: make it {n_entries + 1}, or remove it"
            findings.add(section.at("n_trials"), advice, search.n_trials)
        return
    if not search.space and "space" not in section and not findings.mistakes:
        findings.warn("search.space", "is empty, so the default trial is the only one")
    finite_list = search.sampler.rpartition(".")[2] in ("grid", "GridSampler")
    needs_count = "space" in section and not finite_list
    if needs_count and search.n_trials is None and section.raw.get("n_trials") is None:
        findings.add(section.at("n_trials"), "is missing: how many trials, the default one included")


def _note_dataset_names(
    default: Mapping[str, Any],
    search: SearchConfig,
    entries: list[dict[str, Any]],
    datasets: Mapping[str, Any],
    findings: Findings,
) -> None:
    """Note names that are no data set, and data sets that no trial uses."""
    if not datasets:
        return
    used = {"trial.dataset": [default["dataset"]]}
    if "dataset" in search.space:
        values = grid_values(search.space["dataset"]) or []
        used["search.space.dataset"] = [decode("dataset", value) for value in values]
    for index, entry in enumerate(entries):
        if "dataset" in entry:
            used[f"search.trials[{index}].dataset"] = [entry["dataset"]]
    for path, names in used.items():
        for name in names:
            if name not in datasets:
                findings.add(path, f"there is no data set of this name; there are {', '.join(datasets)}", name)
    for name in datasets.keys() - {name for names in used.values() for name in names}:
        findings.warn(f"datasets.{name}", "no trial uses it")
