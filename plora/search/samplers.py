"""From a search space to the trials of a sweep: grid, random, any of Optuna's samplers, or an explicit list."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GridSampler

from plora.config.mistakes import Findings
from plora.search.settings import build_trial, merge
from plora.search.space import decode, encode, grid_values, n_combinations
from plora.search.trial import DEFAULT_TRIAL, Trial

SHORT_NAMES = {"grid": "optuna.samplers.GridSampler", "random": "optuna.samplers.RandomSampler"}
LIST = "list"
# These propose without looking at results; the others learn from them, and here there are none to learn from.
_RESULT_FREE = ("GridSampler", "RandomSampler", "QMCSampler")
_DRAWS_PER_TRIAL = 200
MOST_TRIALS = 10_000


def list_trials(default: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], findings: Findings) -> list[Trial]:
    """The default trial and one trial per entry of ``search.trials``.

    Args:
        default: the default trial's settings, complete.
        entries: what each further trial changes.
        findings: collects duplicates.
    """
    trials = [build_trial(0, DEFAULT_TRIAL, default, {name: encode(default.get(name)) for name in _names(entries)})]
    seen = {_identity(trials[0]): "the default trial"}
    for index, entry in enumerate(entries):
        settings = merge(default, entry)
        number = len(trials)
        trial = build_trial(number, _name(number), settings, {k: encode(settings.get(k)) for k in _names(entries)})
        path = f"search.trials[{index}]"
        if (twin := seen.get(_identity(trial))) is not None:
            findings.add(path, f"has the same settings as {twin}: remove it or change one setting", dict(entry))
        else:
            seen[_identity(trial)] = path
        trials.append(trial)
    return trials


def drawn_trials(
    default: Mapping[str, Any],
    space: Mapping[str, BaseDistribution],
    sampler: BaseSampler,
    n_trials: int | None,
    findings: Findings,
) -> list[Trial]:
    """The default trial and those that ``sampler`` draws from ``space``, all different.

    Args:
        default: the default trial's settings, complete.
        space: what is searched.
        sampler: proposes; seeded, so that the same configuration gives the same trials.
        n_trials: how many trials, the default included; None for a whole grid.
        findings: told when fewer trials than ``n_trials`` exist.
    """
    default_params = {name: encode(default[name]) for name in space if name in default}
    trials = [build_trial(0, DEFAULT_TRIAL, default, default_params)]
    seen = {_identity(trials[0])}
    size = n_combinations(space)
    grid = isinstance(sampler, GridSampler)
    wanted = n_trials if n_trials is not None else int(size) + 1
    draws = int(size) if grid else wanted * _DRAWS_PER_TRIAL
    for params in _proposals(space, sampler, draws, findings):
        if len(trials) == wanted:
            break
        settings = merge(default, {name: decode(name, value) for name, value in params.items()})
        trial = build_trial(len(trials), _name(len(trials)), settings, params)
        if _identity(trial) not in seen:
            seen.add(_identity(trial))
            trials.append(trial)
    if n_trials is not None and len(trials) < n_trials:
        findings.warn("search.n_trials", f"only {len(trials)} different trials were found, not {n_trials}")
    elif n_trials is not None and grid and n_trials < size:
        findings.warn("search.n_trials", f"{n_trials} trials are a random part of the grid's {size:g} combinations")
    return trials


def _proposals(
    space: Mapping[str, BaseDistribution], sampler: BaseSampler, limit: int, findings: Findings
) -> Iterator[dict[str, Any]]:
    """Up to ``limit`` proposals of ``sampler``. Its study is in memory: nothing is stored before all is checked."""
    with quiet_optuna():
        study = optuna.create_study(sampler=sampler)
    for _ in range(limit):
        try:
            with quiet_optuna():
                params = study.ask(dict(space)).params
        except (ImportError, ValueError) as error:
            findings.add("search.sampler", f"{type(sampler).__name__} cannot draw from this space: {error}")
            return
        yield params


def make_sampler(
    component: str, options: Mapping[str, Any], space: Mapping[str, BaseDistribution], seed: int, findings: Findings
) -> BaseSampler | None:
    """One of Optuna's samplers, by name; None and a note if it cannot be made.

    Args:
        component: ``grid``, ``random`` or a dotted name such as ``optuna.samplers.RandomSampler``.
        options: its arguments.
        space: what it will draw from.
        seed: used where the options give none.
        findings: collects what is wrong.
    """
    dotted = SHORT_NAMES.get(component, component)
    module, _, name = dotted.rpartition(".")
    sampler_class = getattr(optuna.samplers, name, None) if module == "optuna.samplers" else None
    if not (inspect.isclass(sampler_class) and issubclass(sampler_class, BaseSampler)):
        advice = "must be grid, random, list or one of Optuna's such as optuna.samplers.RandomSampler"
        findings.add("search.sampler", advice, component)
        return None
    if name not in _RESULT_FREE:
        findings.warn("search.sampler", f"{name} learns from results, but all trials are drawn before one runs")
    arguments = {"seed": seed, **options} if "seed" in inspect.signature(sampler_class).parameters else dict(options)
    if sampler_class is GridSampler:
        # Counted before they are listed, which may take all memory; what has no list is noted below.
        size = math.prod(n for name in space if math.isfinite(n := n_combinations({name: space[name]})))
        if size > MOST_TRIALS:
            advice = f"the grid has {size:.3g} combinations: list fewer values, or draw at random"
            findings.add("search.space", advice)
            return None
        grid = _grid(space, findings)
        if grid is None:
            return None
        arguments["search_space"] = grid
    try:
        with quiet_optuna():
            return sampler_class(**arguments)
    except (TypeError, ValueError) as error:
        findings.add("search.sampler", f"{name} does not accept these arguments: {error}", dict(options))
        return None


def _grid(space: Mapping[str, BaseDistribution], findings: Findings) -> dict[str, list[Any]] | None:
    grid = {name: grid_values(distribution) for name, distribution in space.items()}
    for name, values in grid.items():
        if values is None:
            findings.add(f"search.space.{name}", "a grid needs a list of values, or a range with a step, without log")
    return None if None in grid.values() else {name: list(values or ()) for name, values in grid.items()}


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keeps Optuna's notices, of every study, trial and experimental feature, out of the log."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({name for entry in entries for name in entry})


def _name(number: int) -> str:
    return f"t{number:03d}"


def _identity(trial: Trial) -> str:
    """Equal for trials that would train the same adapter in the same way."""
    return repr(dataclasses.replace(trial, number=0, name="", params={}))
