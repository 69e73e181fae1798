"""The search space: what is searched, as Optuna's distributions, and how values are written in Optuna's storage."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from plora.config.mistakes import Findings, unknown_key
from plora.modules.config import ALL_LINEAR
from plora.search.settings import (
    Setting,
    flatten_data_options,
    name_problem,
    note_exclusive,
    setting_named,
)

RANGE_KEYS = ("low", "high", "log", "step")
_JSON_STARTS = ("[", "{", '"')


def parse_space(raw: Mapping[str, Any], path: str, findings: Findings) -> dict[str, BaseDistribution]:
    """The distribution of every setting that is searched.

    Args:
        raw: for each setting a value, a list of values, or a range ``{low, high, log, step}``.
        path: where ``raw`` stands in the configuration.
        findings: collects what is wrong.
    """
    if isinstance(raw.get("dataset"), Mapping) and set(raw["dataset"]) & set(RANGE_KEYS):
        findings.add(f"{path}.dataset", "must be a list of data set names, not a range", raw["dataset"])
        raw = {name: value for name, value in raw.items() if name != "dataset"}
    space: dict[str, BaseDistribution] = {}
    for name, value in flatten_data_options(raw).items():
        setting = setting_named(name)
        at = f"{path}.{name}"
        if setting is None:
            findings.add(at, name_problem(name), value)
            continue
        distribution = (
            _range(setting, value, at, findings)
            if isinstance(value, Mapping)
            else _choices(setting, value, at, findings)
        )
        if distribution is not None:
            space[name] = distribution
    note_exclusive(space, path, findings)
    return space


def _choices(setting: Setting, value: Any, at: str, findings: Findings) -> CategoricalDistribution | None:
    values = _as_choices(setting, value)
    if not values:
        findings.add(at, "is an empty list: give at least one value, or remove it", value)
        return None
    before = len(findings.mistakes)
    checked = []
    for item in values:
        try:
            checked.append(encode(setting.check(item)))
        except (ValueError, TypeError) as error:
            findings.add(at, str(error), item)
    if len(findings.mistakes) > before:
        return None
    unique = list(dict.fromkeys(checked))
    if len(unique) < len(checked):
        findings.warn(at, f"a value is listed twice, which has no effect: {value!r}")
    return CategoricalDistribution(unique)


def _as_choices(setting: Setting, value: Any) -> Sequence[Any]:
    """The values to choose from, where a setting's one value may itself be a list."""
    if not isinstance(value, (list, tuple)):
        return [value]
    if setting.sequence and value and not any(isinstance(item, (list, tuple)) or item == ALL_LINEAR for item in value):
        return [value]
    return value


def _range(setting: Setting, raw: Mapping[str, Any], at: str, findings: Findings) -> BaseDistribution | None:
    """An Int- or FloatDistribution; None and notes where ``raw`` is not a range of ``setting``."""
    if setting.number is None:
        findings.add(at, "cannot be a range: give a list of values", dict(raw))
        return None
    before = len(findings.mistakes)
    for key in raw:
        if key not in RANGE_KEYS:
            findings.add(f"{at}.{key}", unknown_key(str(key), RANGE_KEYS))
    ends = {end: _range_end(setting, raw, end, at, findings) for end in ("low", "high")}
    log, step = raw.get("log", False), raw.get("step")
    if not isinstance(log, bool):
        findings.add(f"{at}.log", "must be true or false", log)
    if step is not None and (isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 < step < math.inf):
        findings.add(f"{at}.step", "must be a number greater than 0", step)
    if len(findings.mistakes) > before:
        return None
    return _distribution(setting, ends["low"], ends["high"], log, step, at, findings)


def _range_end(setting: Setting, raw: Mapping[str, Any], end: str, at: str, findings: Findings) -> Any:
    if end not in raw:
        findings.add(f"{at}.{end}", "is missing: a range needs low and high")
        return None
    try:
        if isinstance(raw[end], bool) or not isinstance(raw[end], (int, float)):
            raise ValueError("must be a number")
        return setting.check(raw[end])
    except ValueError as error:
        findings.add(f"{at}.{end}", str(error), raw[end])
        return None


def _distribution(
    setting: Setting, low: Any, high: Any, log: bool, step: Any, at: str, findings: Findings
) -> BaseDistribution | None:
    # An option of the data set may be of either kind: the ends and the step decide.
    whole = setting.number is int or all(isinstance(item, int) for item in (low, high, step or 1))
    if low > high:
        findings.add(at, f"low {low} is greater than high {high}: swap them")
    elif log and low <= 0:
        findings.add(f"{at}.low", "must be greater than 0 where log is true", low)
    elif log and step is not None:
        findings.add(at, "log and step cannot be combined: remove one of them")
    elif whole and step is not None and not float(step).is_integer():
        findings.add(f"{at}.step", "must be a whole number", step)
    else:
        if low == high:
            findings.warn(at, f"the range from {low} to {high} holds one value, so nothing is searched")
        if step is not None and not is_multiple(high - low, step):
            reached = low + math.floor((high - low) / step) * step
            findings.warn(at, f"high {high} is never tried: steps of {step} from {low} end at {reached:g}")
            high = int(reached) if whole else reached
        if whole:
            return IntDistribution(int(low), int(high), log=log, step=int(step or 1))
        return FloatDistribution(float(low), float(high), log=log, step=None if step is None else float(step))
    return None


def is_multiple(span: float, step: float) -> bool:
    """Whether ``span`` is a whole number of steps, rounding aside."""
    ratio = span / step
    return math.isclose(ratio, round(ratio), abs_tol=1e-9)


def encode(value: Any) -> Any:
    """``value`` as Optuna's storage takes it: lists become JSON text, and so does text that looks like JSON."""
    if isinstance(value, (list, tuple, dict)) or (isinstance(value, str) and value[:1] in _JSON_STARTS):
        return json.dumps(value)
    return value


def decode(name: str, value: Any) -> Any:
    """The value of setting ``name`` that ``encode`` wrote as ``value``."""
    setting = setting_named(name)
    assert setting is not None, name
    if isinstance(value, str) and value and value[0] in _JSON_STARTS:
        value = json.loads(value)
    return setting.check(value)


def grid_values(distribution: BaseDistribution) -> list[Any] | None:
    """All values of ``distribution`` in order; None if it has no finite list of them that a person meant."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        steps = round((distribution.high - distribution.low) / distribution.step)
        return [distribution.low + index * distribution.step for index in range(steps + 1)]
    if isinstance(distribution, FloatDistribution) and distribution.single():
        return [distribution.low]
    return None


def n_combinations(space: Mapping[str, BaseDistribution]) -> float:
    """How many different settings ``space`` holds; infinite with a range of real numbers."""
    return math.prod((_n_values(distribution) for distribution in space.values()), start=1.0)


def _n_values(distribution: BaseDistribution) -> float:
    # Counted, not listed: a range of seeds, or of tiny steps, has more values than memory holds.
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return (distribution.high - distribution.low) // (1 if distribution.log else distribution.step) + 1
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        return round((distribution.high - distribution.low) / distribution.step) + 1
    return 1 if distribution.single() else math.inf
