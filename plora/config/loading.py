"""From a YAML file, a shipped name or a mapping, with overrides, to a checked ``SweepConfig``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plora.config import checks, sections, shipped
from plora.config.data_checks import note_data_at_hand
from plora.config.mistakes import ConfigError, Findings, Mistake
from plora.config.overrides import apply_overrides
from plora.config.run_checks import note_model_at_hand, output_dir_problems
from plora.config.schema import SweepConfig
from plora.config.section import Section
from plora.config.trials import read_trials

KEYS = (
    "output_dir",
    "seed",
    "device",
    "log_level",
    "model",
    "tokenizer",
    "dataset",
    "datasets",
    "dataset_val",
    "dataset_test",
    "trial",
    "search",
    "objective",
    "evaluation",
    "export",
    "packing",
    "metric_logger",
    "plan_only",
    "hardware",
    "plan",
)


def load(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    new_sweep: bool = True,
) -> SweepConfig:
    """Read, check and complete a sweep's configuration.

    Args:
        source: a YAML file, ``plora/<name>`` for a shipped one, or the configuration itself.
        overrides: ``["trial.lr=1e-4", "~dataset_test"]``, or a mapping whose keys may have dots.
        new_sweep: whether ``output_dir`` must be free; False to look at an existing sweep's configuration.

    Raises:
        ConfigError: with every mistake found.
    """
    findings = Findings()
    name = "the configuration" if isinstance(source, Mapping) else str(source)
    tree = _read(source)
    apply_overrides(tree, overrides, findings)
    config = _interpret(_resolved(tree, "", findings), findings, new_sweep)
    findings.raise_if_any(name)
    assert config is not None
    return config


def _interpret(raw: dict[str, Any], findings: Findings, new_sweep: bool) -> SweepConfig | None:
    root = Section(raw, "", KEYS, findings)
    seed = root.read("seed", checks.whole(0, 2**31 - 1), 0)
    output_dir = root.read("output_dir", checks.text)
    model = sections.read_model(root)
    datasets = sections.read_datasets(root)
    objective, evaluation = sections.read_objective(root), sections.read_evaluation(root)
    sections.note_contradictions(objective, evaluation, datasets, findings)
    tokenizer = sections.read_tokenizer(root, model)
    search, trials = read_trials(root, seed, datasets)
    export, packing = sections.read_export(root), sections.read_packing(root)
    device = root.read("device", checks.one_of("auto", "cpu", "cuda"), "auto")
    log_level = root.read("log_level", checks.one_of("DEBUG", "INFO", "WARNING", "ERROR"), "INFO")
    dataset_val = sections.read_optional_data(root, "dataset_val")
    dataset_test = sections.read_optional_data(root, "dataset_test")
    loggers = sections.read_metric_loggers(root)
    plan_only = root.read("plan_only", checks.boolean, False)
    hardware = sections.read_hardware(root, plan_only)
    plan = sections.read_plan(root, hardware)
    note_data_at_hand(datasets, dataset_val, dataset_test, findings)
    note_model_at_hand(model, tokenizer, trials, findings)
    if output_dir is not None and new_sweep:
        for problem in output_dir_problems(Path(output_dir)):
            findings.add("output_dir", problem, output_dir)
    if findings.mistakes:
        return None
    return SweepConfig(
        output_dir=Path(output_dir).expanduser(),
        seed=seed,
        device=device,
        log_level=log_level,
        model=model,
        tokenizer=tokenizer,
        datasets=datasets,
        dataset_val=dataset_val,
        dataset_test=dataset_test,
        search=search,
        objective=objective,
        evaluation=evaluation,
        export=export,
        packing=packing,
        plan_only=plan_only,
        hardware=hardware,
        plan=plan,
        metric_loggers=loggers,
        trials=trials,
        warnings=tuple(findings.warnings),
        resolved=raw,
    )


def _read(source: str | Path | Mapping[str, Any]) -> DictConfig:
    """The configuration as OmegaConf's tree, interpolations not yet resolved."""
    if isinstance(source, Mapping):
        try:
            return OmegaConf.create({str(key): value for key, value in source.items()})
        except OmegaConfBaseException as error:
            advice = f"holds what YAML cannot: {' '.join(str(error).split())}"
            raise ConfigError([Mistake("", advice)]) from error
    try:
        text = _text(str(source))
        tree = OmegaConf.create(text) if text.strip() else None
    except yaml.YAMLError as error:
        raise ConfigError([Mistake("", f"is not valid YAML: {' '.join(str(error).split())}")], str(source)) from error
    if not isinstance(tree, DictConfig):
        raise ConfigError([Mistake("", "must be a mapping, i.e. lines of `key: value`")], str(source))
    return tree


def _text(source: str) -> str:
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
        if source.startswith(shipped.PREFIX):
            return shipped.text_of(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Mistake("", f"cannot be read: {error}")], source) from error
    except ValueError as error:
        raise ConfigError([Mistake("", str(error))], source) from error
    hint = f"give the path of a YAML file, or a shipped one: {', '.join(shipped.names())}"
    raise ConfigError([Mistake("", f"there is no such file: {hint}")], source)


def _resolved(node: DictConfig | ListConfig, path: str, findings: Findings) -> Any:
    """``node`` as plain mappings and lists. What cannot be worked out is noted and left out."""
    items: list[tuple[str, Any]]
    if isinstance(node, ListConfig):
        items = [(f"{path}[{index}]", index) for index in range(len(node))]
    else:
        items = [(f"{path}.{key!s}" if path else str(key), key) for key in node]
    values: dict[Any, Any] = {}
    for at, key in items:
        try:
            if OmegaConf.is_missing(node, key):
                findings.add(at, "is ???: give it a value, in the file or as an override")
                findings.unreadable.add(at)
                continue
            value = node[key]
        except OmegaConfBaseException as error:
            findings.add(at, f"cannot be worked out: {str(error).splitlines()[0]}")
            findings.unreadable.add(at)
            continue
        if isinstance(value, (DictConfig, ListConfig)):
            values[key] = _resolved(value, at, findings)
        else:
            values[key] = str(value) if isinstance(value, Path) else value
    return list(values.values()) if isinstance(node, ListConfig) else {str(key): value for key, value in values.items()}
