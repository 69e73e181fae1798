"""Reads the sections of a configuration into their typed values. Trials are read in ``trials.py``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plora.config import checks
from plora.config.components import COMPONENT, package_problem, resolve
from plora.config.mistakes import Findings
from plora.config.schema import (
    DEFAULT_LOADER,
    DEFAULT_TOKENIZER,
    METRICS,
    EvaluationConfig,
    ExportConfig,
    GenerationConfig,
    HardwareConfig,
    ModelConfig,
    ObjectiveConfig,
    PackingConfig,
    TokenizerConfig,
)
from plora.config.section import Section
from plora.profiler.hardware import find_gpu
from plora.profiler.memory import STATE_BYTES

_DIRECTIONS = {"val_loss": "minimize", "exact_match": "maximize", "label_accuracy": "maximize"}
# Scores more often than this are not worth their time: ten thousand of them.
_fraction = checks.optional(checks.real(low=1e-4, high=1))


def read_model(root: Section) -> ModelConfig:
    """``model:``."""
    section = root.section("model", (COMPONENT, "source", "revision", "dtype", "activation_checkpointing"))
    return ModelConfig(
        source=section.read("source", checks.text),
        component=section.read(COMPONENT, _importable_later, DEFAULT_LOADER),
        revision=section.read("revision", checks.text, "main"),
        dtype=section.read("dtype", checks.one_of("bf16", "fp32", "nf4"), "bf16"),
        activation_checkpointing=section.read(
            "activation_checkpointing", checks.word_or("auto", _boolean_or_layers), "auto"
        ),
    )


def _boolean_or_layers(value: Any) -> bool | int:
    if isinstance(value, bool):
        return value
    try:
        return checks.whole(1)(value)
    except ValueError:
        raise ValueError("must be true or false, or a number of layers from 1") from None


def read_tokenizer(root: Section, model: ModelConfig) -> TokenizerConfig:
    """``tokenizer:``; it is the model's own unless it says otherwise."""
    known = (COMPONENT, "source", "revision", "chat_template", "max_seq_len", "too_long")
    section = root.section("tokenizer", known)
    source = section.read("source", checks.text, model.source)
    return TokenizerConfig(
        source=source,
        component=section.read(COMPONENT, _importable_later, DEFAULT_TOKENIZER),
        revision=section.read("revision", checks.text, model.revision if source == model.source else "main"),
        chat_template=section.read("chat_template", _chat_template, "checkpoint"),
        max_seq_len=section.read("max_seq_len", checks.optional(checks.whole(2)), 1024),
        too_long=section.read("too_long", checks.one_of("drop", "truncate", "error"), "drop"),
    )


def read_datasets(root: Section) -> dict[str, dict[str, Any]]:
    """``dataset:`` or ``datasets:``, by name. Their options belong to the data component, which checks them."""
    findings = root.findings
    if ("dataset" in root) == ("datasets" in root):
        if "dataset" in root:
            findings.add("datasets", "cannot be given beside dataset: move that one into datasets, under a name")
        elif not findings.unreadable & {"dataset", "datasets"}:
            findings.add("dataset", "is missing: say what to train on")
        return {}
    if "dataset" in root:
        return {"dataset": _data(root.section("dataset", None))}
    named = root.section("datasets", None)
    return {name: _data(named.section(name, None)) for name in named.raw}


def _data(section: Section) -> dict[str, Any]:
    _check_component(section)
    if not section.raw:
        section.findings.add(section.path, "is empty: say what to train on")
    for part in ("val", "test"):
        if part in section:
            _check_component(section.section(part, None))
    return section.raw


def read_optional_data(root: Section, key: str) -> dict[str, Any] | None:
    """``dataset_val:`` or ``dataset_test:``: what it changes in the training data's settings; None where absent."""
    if key not in root:
        return None
    section = root.section(key, None)
    _check_component(section)
    return section.raw


def read_objective(root: Section) -> ObjectiveConfig:
    """``objective:``; the direction follows from plora's own metrics."""
    section = root.section("objective", _fields(ObjectiveConfig))
    metric = section.read("metric", _metric, "val_loss")
    usual = _DIRECTIONS.get(metric)
    direction = section.read("direction", checks.one_of("minimize", "maximize"), usual)
    if direction is None:
        section.findings.add(section.at("direction"), f"is missing: is more of {metric} better? maximize or minimize")
    elif usual is not None and direction != usual:
        section.findings.warn(section.at("direction"), f"{direction} puts the worst {metric} first")
    return ObjectiveConfig(metric=metric, direction=direction or "maximize")


def read_evaluation(root: Section) -> EvaluationConfig:
    """``evaluation:``."""
    section = root.section("evaluation", _fields(EvaluationConfig))
    return EvaluationConfig(
        every=section.read("every", _fraction, 0.1),
        batch_tokens=section.read("batch_tokens", checks.optional(checks.whole(1)), None),
        generation=_read_generation(section) if "generation" in section else None,
    )


def _read_generation(parent: Section) -> GenerationConfig:
    section = parent.section("generation", _fields(GenerationConfig))
    return GenerationConfig(
        top_k=section.read("top_k", checks.optional(checks.whole(1)), 8),
        max_new_tokens=section.read("max_new_tokens", checks.whole(1), 256),
        answer=section.read("answer", checks.optional(_answer), None),
        max_examples=section.read("max_examples", checks.optional(checks.whole(1)), None),
        every=section.read("every", _fraction, None),
    )


def read_export(root: Section) -> ExportConfig:
    """``export:``."""
    section = root.section("export", _fields(ExportConfig))
    return ExportConfig(
        keep=section.read("keep", checks.word_or("all", checks.whole(0)), "all"),
        dtype=section.read("dtype", checks.one_of("bf16", "fp32"), "bf16"),
    )


def read_packing(root: Section) -> PackingConfig:
    """``packing:``."""
    section = root.section("packing", _fields(PackingConfig))
    return PackingConfig(
        tokens_per_microbatch=section.read("tokens_per_microbatch", checks.word_or("auto", checks.whole(1)), "auto"),
        memory_fraction=section.read("memory_fraction", checks.real(above=0, high=1), 0.9),
        optimizer_state=section.read("optimizer_state", checks.one_of(*STATE_BYTES), "exact"),
        cuda_graphs=section.read("cuda_graphs", checks.boolean, True),
        max_adapters=section.read("max_adapters", checks.optional(checks.whole(1)), None),
        solver=section.read("solver", checks.one_of("auto", "HiGHS", "CBC"), "auto"),
        time_limit=section.read("time_limit", checks.optional(checks.real(above=0)), None),
        calibrate=section.read("calibrate", checks.one_of("auto", "always", "never"), "auto"),
    )


# More are a slip of the keyboard, and take minutes to plan for.
MOST_DEVICES = 4096


def read_hardware(root: Section, plan_only: bool) -> HardwareConfig | None:
    """``hardware:``, which only a plan can be made for."""
    if "hardware" not in root:
        return None
    section = root.section("hardware", _fields(HardwareConfig))
    if not plan_only:
        section.findings.add("hardware", "a sweep trains on what is here: set plan_only=true, or remove it")
    gpu, count = section.read("gpu", _data_sheet), section.read("count", checks.whole(1, MOST_DEVICES), 1)
    return None if gpu is None else HardwareConfig(gpu, count)


def read_plan(root: Section, hardware: HardwareConfig | None) -> Path | None:
    """``plan:``, the file of a plan to follow."""
    path = root.read("plan", checks.optional(_plan_file), None)
    if path is not None and hardware is not None:
        root.findings.add("plan", "is followed on what is here: remove hardware, or plan", str(path))
    return path


def _plan_file(value: Any) -> Path:
    from plora.planner.plan import Plan  # here, because the solver's interface takes a moment to import

    path = Path(checks.text(value)).expanduser()
    try:
        Plan.load(path)
    except ValueError as error:
        raise ValueError(f"must be a plan that `plan_only=true` wrote ({error})") from None
    return path


def _data_sheet(value: Any) -> str:
    return find_gpu(checks.text(value)).name


def read_metric_loggers(root: Section) -> tuple[dict[str, Any], ...]:
    """``metric_logger:``: one tracker or a list of them."""
    raw = root.raw.get("metric_logger")
    entries = raw if isinstance(raw, list) else [] if raw is None else [raw]
    loggers = []
    for index, entry in enumerate(entries):
        path = f"metric_logger[{index}]" if isinstance(raw, list) else "metric_logger"
        section = Section(entry, path, None, root.findings)
        if isinstance(entry, Mapping):
            section.read(COMPONENT, _importable_later)
        loggers.append(section.raw)
    return tuple(loggers)


def note_contradictions(
    objective: ObjectiveConfig,
    evaluation: EvaluationConfig,
    datasets: Mapping[str, Mapping[str, Any]],
    findings: Findings,
) -> None:
    """Note sections that are right one by one but not together."""
    generation = evaluation.generation
    if objective.needs_answers and generation is None:
        advice = "needs evaluation.generation, because it judges generated answers; add it, with an `answer` rule"
        findings.add("objective.metric", advice, objective.metric)
    if not objective.needs_answers and generation is not None and generation.every is None:
        findings.warn(
            "evaluation.generation",
            f"has no effect: {objective.metric} needs no answers; set every to watch exact_match, or another objective",
        )
    if objective.metric == "label_accuracy":
        from plora.data.prompts import CLASSIFICATION, COMPONENTS

        for name, settings in datasets.items():
            kind = COMPONENTS.get(settings.get(COMPONENT, "plora.data.instruct_dataset"), CLASSIFICATION)
            if kind != CLASSIFICATION:
                path = f"{'dataset' if name == 'dataset' else f'datasets.{name}'}.{COMPONENT}"
                findings.add(path, "must be plora.data.classification, with label_words, for label_accuracy")


def _fields(section: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(section))


def _check_component(section: Section) -> None:
    if COMPONENT in section.raw:
        section.read(COMPONENT, _importable_later)


def _importable_later(value: Any) -> str:
    problem = package_problem(checks.dotted_name(value))
    if problem:
        raise ValueError(problem)
    return value


def _chat_template(value: Any) -> str:
    if value in (None, "none"):
        return "none"
    if value == "checkpoint":
        return value
    if not isinstance(value, str) or not Path(value).expanduser().is_file():
        raise ValueError("must be checkpoint, none or the path of a Jinja file; there is no such file")
    return value


def _metric(value: Any) -> str:
    if value in METRICS:
        return value
    if not isinstance(value, str) or "." not in value:
        return checks.one_of(*METRICS, "the dotted name of a callable")(value)
    return _callable(value)


def _callable(value: str) -> str:
    if not callable(resolve(checks.dotted_name(value))):
        raise ValueError("is not callable: name a function")
    return value


def _answer(value: Any) -> str:
    """A regular expression, or the dotted name of a callable."""
    checks.text(value)
    if checks.is_dotted_name(value):
        return _callable(value)
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    return value
