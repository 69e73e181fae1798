"""The settings of a trial: what each accepts, and how a set of them becomes a ``Trial``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plora.config import checks
from plora.config.mistakes import Findings, unknown_key
from plora.modules.config import ALL_LINEAR, MAX_RANK, AdapterConfig
from plora.modules.names import problem_with
from plora.search.trial import SCHEDULES, Trial

DATA_PREFIX = "dataset."
# Two ways to say one thing: naming one in the search puts the other one's default out of force.
EXCLUSIVE = {
    "alpha": "alpha_over_rank",
    "alpha_over_rank": "alpha",
    "epochs": "max_steps",
    "max_steps": "epochs",
    "warmup_fraction": "warmup_steps",
    "warmup_steps": "warmup_fraction",
}
_LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Setting:
    """One setting of a trial.

    Args:
        check: returns the value to use or raises a ``ValueError`` that says what is accepted.
        number: ``int`` or ``float`` if a range of it can be searched, else None.
        sequence: whether one value is itself a list.
    """

    check: checks.Check
    number: type | None = None
    sequence: bool = False


def _target_modules(value: Any) -> str | tuple[str, ...]:
    if value == ALL_LINEAR:
        return ALL_LINEAR
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"must be {ALL_LINEAR} or a list of layer names such as [q_proj, v_proj]")
    problems = [problem for name in value if (problem := problem_with(name))]
    if problems:
        raise ValueError("; ".join(problems))
    # Sorted, because the order means nothing and two orders would count as two settings.
    return tuple(sorted(set(value)))


def _betas(value: Any) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError("must be two numbers such as [0.9, 0.999]")
    first, second = (checks.real(low=0, below=1)(item) for item in value)
    return first, second


SETTINGS: dict[str, Setting] = {
    "lr": Setting(checks.real(above=0), float),
    "rank": Setting(checks.whole(1, MAX_RANK), int),
    "alpha": Setting(checks.real(above=0), float),
    "alpha_over_rank": Setting(checks.real(above=0), float),
    "dropout": Setting(checks.real(low=0, below=1), float),
    "batch_size": Setting(checks.whole(1), int),
    "epochs": Setting(checks.real(above=0), float),
    "max_steps": Setting(checks.whole(1), int),
    "warmup_fraction": Setting(checks.real(low=0, high=1), float),
    "warmup_steps": Setting(checks.whole(0), int),
    "schedule": Setting(checks.one_of(*SCHEDULES)),
    "weight_decay": Setting(checks.real(low=0), float),
    "betas": Setting(_betas, sequence=True),
    "eps": Setting(checks.real(above=0), float),
    "max_grad_norm": Setting(checks.optional(checks.real(above=0)), float),
    "target_modules": Setting(_target_modules, sequence=True),
    "rslora": Setting(checks.boolean),
    "loraplus_ratio": Setting(checks.real(above=0), float),
    "seed": Setting(checks.whole(0, _LARGEST_SEED), int),
    "dataset": Setting(checks.text),
}
DEFAULTS: dict[str, Any] = {
    "lr": 2e-4,
    "rank": 16,
    "alpha_over_rank": 2.0,
    "dropout": 0.0,
    "batch_size": 16,
    "epochs": 1.0,
    "warmup_fraction": 0.03,
    "schedule": "cosine",
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "max_grad_norm": 1.0,
    "target_modules": ALL_LINEAR,
    "rslora": False,
    "loraplus_ratio": 1.0,
}


def setting_named(name: str) -> Setting | None:
    """The setting called ``name``; options of the data set are ``dataset.<option>``."""
    if name.startswith(DATA_PREFIX) and len(name) > len(DATA_PREFIX):
        return Setting(lambda value: value, float)
    return SETTINGS.get(name)


def name_problem(name: str) -> str:
    """The advice for ``name``, which is not a setting."""
    if name == "gradient_accumulation_steps":
        return (
            "batch_size is examples per optimizer step, and plora splits them into microbatches by itself: remove this "
            "key and multiply it into batch_size"
        )
    return unknown_key(name, [*SETTINGS, "dataset.<option>"])


def read_settings(raw: Mapping[str, Any], path: str, findings: Findings) -> dict[str, Any]:
    """The checked settings of ``raw``: those of ``trial:`` or of one entry of ``search.trials``.

    A null leaves a setting out, except where it is itself a value (``max_grad_norm``).
    """
    settings: dict[str, Any] = {}
    for name, value in flatten_data_options(raw).items():
        setting = setting_named(name)
        if setting is None:
            findings.add(f"{path}.{name}", name_problem(name), value)
        elif value is not None or name == "max_grad_norm":
            try:
                settings[name] = setting.check(value)
            except ValueError as error:
                findings.add(f"{path}.{name}", str(error), value)
    note_exclusive(settings, path, findings)
    return settings


def note_exclusive(names: Mapping[str, Any], path: str, findings: Findings) -> None:
    """Note every pair of ``names`` of which only one may be given."""
    for name in names:
        other = EXCLUSIVE.get(name)
        if other in names and name < str(other):
            findings.add(f"{path}.{name}", f"cannot be given beside {other}: keep one of them")


def flatten_data_options(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``{"dataset": {"max_examples": 5}}``, as overrides write it, in the form ``{"dataset.max_examples": 5}``."""
    flat: dict[str, Any] = {}
    for name, value in raw.items():
        if name == "dataset" and isinstance(value, Mapping):
            flat.update({f"{DATA_PREFIX}{option}": item for option, item in value.items()})
        else:
            flat[str(name)] = value
    return flat


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``; a change puts out of force what says the same in another way."""
    replaced = {EXCLUSIVE[name] for name in changes if name in EXCLUSIVE}
    return {name: value for name, value in base.items() if name not in replaced} | dict(changes)


def build_trial(number: int, name: str, settings: Mapping[str, Any], params: Mapping[str, Any]) -> Trial:
    """The trial that ``settings``, complete and checked, describe.

    Args:
        number: its number in the study.
        name: its name.
        settings: every setting it needs, by name.
        params: what the search chose for it, as stored in the study.
    """
    rank = settings["rank"]
    alpha = settings["alpha"] if "alpha" in settings else settings["alpha_over_rank"] * rank
    adapter = AdapterConfig(
        rank=rank,
        alpha=alpha,
        dropout=settings["dropout"],
        target_modules=settings["target_modules"],
        rslora=settings["rslora"],
        seed=settings["seed"],
    )
    plain = ("lr", "batch_size", "schedule", "weight_decay", "betas", "eps", "max_grad_norm", "loraplus_ratio", "seed")
    return Trial(
        number=number,
        name=name,
        adapter=adapter,
        **{key: settings[key] for key in plain},
        epochs=settings.get("epochs"),
        max_steps=settings.get("max_steps"),
        warmup_fraction=settings.get("warmup_fraction", 0.0),
        warmup_steps=settings.get("warmup_steps"),
        dataset=settings["dataset"],
        dataset_options={
            key.removeprefix(DATA_PREFIX): settings[key] for key in sorted(settings) if key.startswith(DATA_PREFIX)
        },
        params=dict(params),
    )
