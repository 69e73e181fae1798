"""What is checked, and made on the way, before data are read: device, model, tokenizer, trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from plora.config.components import COMPONENT, instantiate, resolve
from plora.config.mistakes import ConfigError, Mistake
from plora.config.run_checks import check_run
from plora.config.schema import SweepConfig
from plora.data import ChatTokenizer
from plora.data.types import Task
from plora.models import ModelSpec
from plora.models import check as check_model
from plora.models import inspect as inspect_model
from plora.models import resolve as resolve_checkpoint
from plora.report.trackers import Tracker

T = TypeVar("T")


@dataclass(frozen=True)
class Checked:
    """A sweep that may start.

    Args:
        device: where it runs.
        spec: the base model's shape.
        tokenizer: of all data sets.
        trackers: made, not opened.
        warnings: settings that have no effect, or not the one they seem to have.
    """

    device: torch.device
    spec: ModelSpec
    tokenizer: ChatTokenizer
    trackers: tuple[Tracker, ...]
    warnings: tuple[str, ...]


def check_sweep(config: SweepConfig) -> Checked:
    """Check ``config`` against this machine and the checkpoint; nothing is written.

    Raises:
        ConfigError: with every mistake that was found.
    """
    mistakes: list[Mistake | str] = []

    def attempt(make: Callable[[], T]) -> T | None:
        try:
            return make()
        except ConfigError as error:
            mistakes.extend(error.mistakes)
        except ValueError as error:
            mistakes.append(str(error))
        return None

    device = attempt(lambda: find_device(config.device))
    trackers = [attempt(lambda settings=settings: _tracker(settings)) for settings in config.metric_loggers]  # type: ignore[misc]
    look_at = inspect_model if config.plan_only else check_model  # a plan needs no weights
    spec = attempt(lambda: look_at(config.model.source, config.model.revision))
    errors, warnings = check_run(config, config.trials, spec)
    mistakes += errors
    # A checkpoint that cannot be read is said once, not once more for its tokenizer.
    tokenizer = attempt(lambda: load_tokenizer(config, spec)) if spec or _own_tokenizer(config) else None
    if mistakes:
        raise ConfigError(mistakes)
    assert device is not None
    assert spec is not None
    assert tokenizer is not None
    made = tuple(tracker for tracker in trackers if tracker is not None)
    return Checked(device, spec, tokenizer, made, (*config.warnings, *warnings))


def check_lengths(tasks: Mapping[str, Task], spec: ModelSpec) -> None:
    """Refuse examples that the model has no positions for, before its weights are loaded.

    Raises:
        ValueError: with the longest, and what to change.
    """
    limit = spec.longest_sequence
    for task in {id(task): task for task in tasks.values()}.values():
        longest = max(len(example) for split in (task.train, task.val, task.test) for example in split)
        if longest > limit:
            raise ValueError(
                f"data set {task.name!r}: its longest example has {longest} tokens, but {spec.name} takes sequences of "
                f"at most {limit}: set tokenizer.max_seq_len to {limit} or less"
            )


def find_device(name: str) -> torch.device:
    """The device called ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ValueError: if there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda': torch sees no CUDA device; use device=cpu, or install torch for CUDA")
    return torch.device(name)


def load_tokenizer(config: SweepConfig, spec: ModelSpec | None) -> ChatTokenizer:
    """The tokenizer, by default the base model's and then of the same commit.

    Raises:
        ValueError: if there is none, or its chat template cannot be used.
    """
    given = config.tokenizer
    revision = given.revision
    if spec is not None and spec.commit is not None and not _own_tokenizer(config):
        revision = spec.commit
    tokenizer: ChatTokenizer = resolve(given.component)(
        str(resolve_checkpoint(given.source, revision, weights=False).folder),
        chat_template=given.chat_template,
        max_seq_len=given.max_seq_len,
        too_long=given.too_long,
    )
    return tokenizer


def _own_tokenizer(config: SweepConfig) -> bool:
    return config.tokenizer.source != config.model.source


def _tracker(settings: dict[str, object]) -> Tracker:
    tracker = instantiate(settings)
    if not isinstance(tracker, Tracker):
        raise ValueError(
            f"metric_logger: {settings[COMPONENT]} is none of plora's trackers: name one of them, such as "
            "plora.report.TensorBoardLogger, or a class derived from plora.report.Tracker"
        )
    return tracker
