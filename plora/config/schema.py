"""A sweep's configuration as typed values. Each class is one section of the YAML file; ``sections.py`` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from optuna.distributions import BaseDistribution

from plora.search.trial import Trial

DEFAULT_LOADER = "plora.models.from_pretrained"
DEFAULT_TOKENIZER = "plora.data.hf_tokenizer"
DataSections = tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any] | None]
METRICS = ("val_loss", "exact_match", "label_accuracy")


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model.

    Args:
        source: a folder or a hub id.
        component: dotted name of the function that loads it.
        revision: branch, tag or commit on the hub.
        dtype: ``bf16``, ``fp32`` or ``nf4`` (4-bit weights, products in bf16).
        activation_checkpointing: recompute activations in backward, of all layers or of this many; ``"auto"``
            where memory asks for it.
    """

    source: str
    component: str = DEFAULT_LOADER
    revision: str = "main"
    dtype: str = "bf16"
    activation_checkpointing: bool | int | str = "auto"

    @property
    def compute_dtype(self) -> str:
        """What products are computed in: ``bf16`` or ``fp32``."""
        return "bf16" if self.dtype == "nf4" else self.dtype

    @property
    def quantize(self) -> str | None:
        """``"nf4"`` where the base's weights are stored in 4 bits, else None."""
        return "nf4" if self.dtype == "nf4" else None


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens.

    Args:
        source: a folder or a hub id; the model's where not given.
        component: dotted name of the function that loads it.
        revision: branch, tag or commit on the hub.
        chat_template: ``checkpoint``, ``none`` or the path of a Jinja file.
        max_seq_len: most tokens of an example; None for no limit.
        too_long: what happens to longer ones: ``drop``, ``truncate`` or ``error``.
    """

    source: str
    component: str = DEFAULT_TOKENIZER
    revision: str = "main"
    chat_template: str = "checkpoint"
    max_seq_len: int | None = 1024
    too_long: str = "drop"


@dataclass(frozen=True)
class SearchConfig:
    """What is tried.

    Args:
        sampler: ``grid``, ``random``, ``list`` or the dotted name of one of Optuna's samplers.
        sampler_options: its arguments.
        n_trials: trials asked for, the default one included; None for a whole grid or a list.
        space: the distribution of every searched setting; empty for a list.
    """

    sampler: str = "random"
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    n_trials: int | None = None
    space: Mapping[str, BaseDistribution] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What ranks the trials.

    Args:
        metric: ``val_loss``, ``exact_match``, ``label_accuracy`` or the dotted name of a callable.
        direction: ``minimize`` or ``maximize``.
    """

    metric: str = "val_loss"
    direction: Literal["minimize", "maximize"] = "minimize"

    @property
    def is_callable(self) -> bool:
        """Whether the metric is the user's own."""
        return self.metric not in METRICS

    @property
    def needs_answers(self) -> bool:
        """Whether the metric judges generated answers."""
        return self.is_callable or self.metric == "exact_match"


@dataclass(frozen=True)
class GenerationConfig:
    """Scoring by generated answers.

    Args:
        top_k: how many trials generate: the best by validation loss, beside base and default; None for all.
        max_new_tokens: longest answer.
        answer: regular expression whose first group is the answer, or the dotted name of a callable; None
            compares the whole text.
        max_examples: how many validation examples are answered; None for all.
        every: fraction of each trial's own training between two scorings; None only at the end.
    """

    top_k: int | None = 8
    max_new_tokens: int = 256
    answer: str | None = None
    max_examples: int | None = None
    every: float | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """When and how trials are scored.

    Args:
        every: fraction of each trial's own training between two validation losses; None only at the end.
        batch_tokens: tokens of a forward pass in evaluation; None for the training's budget.
        generation: scoring by generated answers; None for none.
    """

    every: float | None = 0.1
    batch_tokens: int | None = None
    generation: GenerationConfig | None = None


@dataclass(frozen=True)
class ExportConfig:
    """What is kept.

    Args:
        keep: how many of the best adapters are written, or ``"all"``.
        dtype: of their weights, ``bf16`` or ``fp32``.
    """

    keep: int | str = "all"
    dtype: str = "bf16"

    def n_kept(self, n_trials: int) -> int:
        """How many of ``n_trials`` adapters are written."""
        return n_trials if isinstance(self.keep, str) else min(self.keep, n_trials)


@dataclass(frozen=True)
class PackingConfig:
    """How trials share the device.

    Args:
        tokens_per_microbatch: token budget of a microbatch; ``"auto"`` is chosen by the memory model.
        memory_fraction: part of the device's free memory that a plan may use.
        optimizer_state: ``exact`` (fp32) or ``8bit`` moments of AdamW.
        cuda_graphs: run small microbatches as CUDA graphs, where the CUDA kernels run.
        max_adapters: most adapters in a pack; None for no limit but memory.
        solver: ``HiGHS``, ``CBC`` or ``auto``.
        time_limit: seconds that the search for a better plan may take; None for what is usual.
        calibrate: when the device is profiled before planning: ``auto`` where no profile is stored and the sweep is
            long enough, ``always`` where none is stored, or ``never``, which also stores none from the run.
    """

    tokens_per_microbatch: int | str = "auto"
    memory_fraction: float = 0.9
    optimizer_state: str = "exact"
    cuda_graphs: bool = True
    max_adapters: int | None = None
    solver: str = "auto"
    time_limit: float | None = None
    calibrate: str = "auto"


@dataclass(frozen=True)
class HardwareConfig:
    """Devices to plan for, which need not be here.

    Args:
        gpu: name of a data sheet, such as ``a100_40gb`` or ``h100``.
        count: how many.
    """

    gpu: str
    count: int = 1


@dataclass(frozen=True)
class SweepConfig:
    """A whole sweep, checked.

    Args:
        output_dir: where everything is written.
        seed: of the sampler, of the data split, and of trials that set none.
        device: ``auto``, ``cpu`` or ``cuda``.
        log_level: of the log file and the terminal.
        model, tokenizer, search, objective, evaluation, export, packing: the sections of these names.
        datasets: the training data, by name; a single ``dataset:`` is called ``"dataset"``.
        dataset_val: what the validation data changes in it; None splits some off.
        dataset_test: what the test data changes in it; None for no test data.
        plan_only: show what would run where and for how long, and train nothing.
        hardware: the devices to plan for; None for those here.
        plan: file of a plan to follow; None makes one.
        metric_loggers: trackers, as ``{"_component_": dotted name, **arguments}``.
        trials: what is trained; the first is the default.
        warnings: settings that have no effect, or not the one they seem to have.
        resolved: the configuration as plain mappings, interpolations resolved, for ``config.yaml``.
    """

    output_dir: Path
    seed: int
    device: str
    log_level: str
    model: ModelConfig
    tokenizer: TokenizerConfig
    datasets: Mapping[str, Mapping[str, Any]]
    dataset_val: Mapping[str, Any] | None
    dataset_test: Mapping[str, Any] | None
    search: SearchConfig
    objective: ObjectiveConfig
    evaluation: EvaluationConfig
    export: ExportConfig
    packing: PackingConfig
    plan_only: bool
    hardware: HardwareConfig | None
    plan: Path | None
    metric_loggers: tuple[Mapping[str, Any], ...]
    trials: tuple[Trial, ...]
    warnings: tuple[str, ...]
    resolved: Mapping[str, Any]

    def data_of(self, trial: Trial) -> DataSections:
        """The settings of ``trial``'s data, its own data options applied to those of the training data."""
        train, val, test = data_sections(self.datasets[trial.dataset], self.dataset_val, self.dataset_test)
        return {**train, **trial.dataset_options}, val, test

    def to_yaml(self, *, commit: str | None = None) -> str:
        """The text of ``config.yaml``: everything resolved.

        Args:
            commit: the base model's resolved commit, written as its revision.
        """
        resolved = dict(self.resolved)
        if commit is not None:
            resolved["model"] = {**resolved["model"], "revision": commit}
        return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)


def data_sections(
    settings: Mapping[str, Any], val: Mapping[str, Any] | None, test: Mapping[str, Any] | None
) -> DataSections:
    """Train, validation and test settings of a data set: its own ``val`` and ``test`` go before the common ones."""
    train = dict(settings)
    val, test = train.pop("val", val), train.pop("test", test)
    return train, None if val is None else dict(val), None if test is None else dict(test)
