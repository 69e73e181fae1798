"""Checks of a sweep against the world: the model's shape, the output directory, the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plora.checkpoint.layout import SweepLayout
from plora.config.data_checks import data_problems
from plora.config.mistakes import Findings
from plora.config.schema import ExportConfig, ModelConfig, SweepConfig, TokenizerConfig
from plora.modules.config import ALL_LINEAR
from plora.modules.names import problem_with
from plora.profiler.memory import DTYPE_BYTES, format_bytes, targeted
from plora.search.trial import Trial

if TYPE_CHECKING:
    from plora.models.spec import ModelSpec

# A finished trial's exact state is its fp32 weights.
_STATE_BYTES = 4
# Every exported adapter has the tokenizer beside it; its file takes about this much per vocabulary entry.
_TOKENIZER_BYTES = 80


def check_run(config: SweepConfig, trials: Sequence[Trial], spec: ModelSpec | None) -> tuple[list[str], list[str]]:
    """What stands in the way of running ``trials`` on the model ``spec``, found before any weight is read.

    Args:
        config: the sweep's.
        trials: what is trained.
        spec: the model; None if it could not be read, which leaves out what depends on it.

    Returns:
        The errors, which stop the sweep, and the warnings.
    """
    errors = [f"output_dir: {problem}" for problem in output_dir_problems(config.output_dir)]
    errors += data_problems(config)
    if spec is None:
        return errors, []
    misfits = model_problems(config.model, config.tokenizer, trials, spec)
    errors += misfits
    if not misfits and not config.plan_only:
        errors += _disk_problems(config.output_dir, required_bytes(trials, spec, config.export))
    return errors, [] if misfits else rank_warnings(trials, spec)


def model_problems(
    model: ModelConfig, tokenizer: TokenizerConfig, trials: Sequence[Trial], spec: ModelSpec
) -> list[str]:
    """What does not fit the model ``spec``: target modules, lengths, layers."""
    errors = check_targets(trials, spec)
    recomputed = model.activation_checkpointing
    if not isinstance(recomputed, (bool, str)) and recomputed > spec.num_layers:
        errors.append(
            f"model.activation_checkpointing = {recomputed}: {spec.name} has {spec.num_layers} layers; "
            "give at most as many, or true for all"
        )
    longest = tokenizer.max_seq_len
    if longest is not None and longest > spec.max_positions:
        errors.append(
            f"tokenizer.max_seq_len = {longest}: {spec.name} was trained on at most {spec.max_positions} positions; "
            f"lower it to {spec.max_positions}"
        )
    return errors


def note_model_at_hand(
    model: ModelConfig, tokenizer: TokenizerConfig, trials: Sequence[Trial], findings: Findings
) -> None:
    """Note what does not fit a model that lies in a folder, so that it comes in one list with all other mistakes.

    Whatever is wrong with the checkpoint itself is found when it is looked at closely.
    """
    from plora.models.spec import ModelError, ModelSpec

    path = Path(str(model.source)).expanduser() / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        spec = ModelSpec.from_config(content if isinstance(content, dict) else {}, source=str(model.source))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ModelError):
        return
    for problem in model_problems(model, tokenizer, trials, spec):
        where, _, advice = problem.partition(": ")
        # A default stands in for a value that is wrong, and is no mistake of the user's.
        if where.partition(" = ")[0] not in {mistake.path for mistake in findings.mistakes}:
            findings.add(where, advice)


def check_targets(trials: Sequence[Trial], spec: ModelSpec) -> list[str]:
    """A mistake for every target module of ``trials`` that the model does not have."""
    linears = frozenset(linear.name for linear in spec.linears)
    users: dict[str, list[str]] = {}
    for trial in trials:
        if trial.adapter.target_modules != ALL_LINEAR:
            for name in trial.adapter.target_modules:
                if name not in linears:
                    users.setdefault(name, []).append(trial.name)
    return [
        f"target_modules: {problem_with(name, linears)} (model {spec.name}; used by {some(trials_of)})"
        for name, trials_of in users.items()
    ]


def rank_warnings(trials: Sequence[Trial], spec: ModelSpec) -> list[str]:
    """A warning for every rank that is larger than a layer it is used on can make use of."""
    users: dict[tuple[int, str, int], list[str]] = {}
    for trial in trials:
        for linear in targeted(spec, trial.adapter.target_modules):
            width = min(linear.in_features, linear.out_features)
            if trial.adapter.rank > width:
                users.setdefault((trial.adapter.rank, linear.name, width), []).append(trial.name)
    return [
        f"rank {rank} is above the width {width} of {name}, so part of it is idle there (used by {some(names)})"
        for (rank, name, width), names in users.items()
    ]


def required_bytes(trials: Sequence[Trial], spec: ModelSpec, export: ExportConfig) -> int:
    """Disk space, in bytes, for the states of all trials and the largest set of adapters that may be exported."""
    sizes = sorted((_n_params(trial, spec) for trial in trials), reverse=True)
    exported = sizes[: export.n_kept(len(sizes))]
    tokenizers = len(exported) * spec.vocab_size * _TOKENIZER_BYTES
    return sum(sizes) * _STATE_BYTES + sum(exported) * DTYPE_BYTES[export.dtype] + tokenizers


def output_dir_problems(output_dir: Path) -> list[str]:
    """Why a new sweep, or its plan alone, cannot be written to ``output_dir``; empty if it can."""
    output_dir = output_dir.expanduser()
    try:
        if SweepLayout(output_dir).holds_sweep():
            return ["already holds a sweep, which is never overwritten: name another directory, or move that one away"]
        existing = _nearest_existing(output_dir)
    except OSError as error:  # such as a name that is too long
        return [f"cannot be used ({error.strerror}): name another directory"]
    if existing.is_symlink() and not existing.exists():
        return [f"{existing} is a link to {existing.readlink()}, which does not exist: name another directory"]
    if not existing.is_dir():
        return [f"{existing} is a file, not a directory: name another directory"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"cannot be written: you have no permission in {existing.resolve()}; name another directory"]
    return []


def _disk_problems(output_dir: Path, needed: int) -> list[str]:
    free = shutil.disk_usage(_nearest_existing(output_dir)).free
    if needed <= free:
        return []
    return [
        f"output_dir = '{output_dir}': the adapters need up to {format_bytes(needed)}, but the disk has "
        f"{format_bytes(free)} free; make room, name another directory, or keep fewer adapters (export.keep)"
    ]


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and not path.is_symlink():
        path = path.parent
    return path


def _n_params(trial: Trial, spec: ModelSpec) -> int:
    layers = targeted(spec, trial.adapter.target_modules)
    per_rank = sum(linear.in_features + linear.out_features for linear in layers)
    return spec.num_layers * trial.adapter.rank * per_rank


def some(names: Sequence[str]) -> str:
    """The names in a few words, however many they are."""
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:3])} and {len(names) - 3} more"
