"""The data of every trial: each distinct data set is read and tokenized once."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from plora.config.run_checks import some
from plora.config.schema import SweepConfig
from plora.data import load_task
from plora.data.tokenizer import ChatTokenizer
from plora.data.types import Task
from plora.search.trial import Trial

log = logging.getLogger(__name__)


def load_tasks(config: SweepConfig, tokenizer: ChatTokenizer) -> dict[str, Task]:
    """The task of each trial, by trial name; trials of equal data settings share one.

    Raises:
        ValueError: if a data set cannot be read or has nothing to train on.
    """
    made: dict[str, Task] = {}
    tasks = {trial.name: _task(config, trial, tokenizer, made) for trial in config.trials}
    _warn_of_large_batches(config, tasks)
    return tasks


def _task(config: SweepConfig, trial: Trial, tokenizer: ChatTokenizer, made: dict[str, Task]) -> Task:
    train, val, test = config.data_of(trial)
    key = json.dumps([trial.dataset, train, val, test], sort_keys=True, default=str)
    if key not in made:
        name = _name(trial.dataset, trial.dataset_options, {task.name for task in made.values()})
        made[key], report = load_task(name, train, val, test, tokenizer, config.seed)
        log.info("%s", report)
    return made[key]


def _warn_of_large_batches(config: SweepConfig, tasks: Mapping[str, Task]) -> None:
    users: dict[tuple[int, str, int], list[str]] = {}
    for trial in config.trials:
        task = tasks[trial.name]
        if trial.batch_size > len(task.train):
            users.setdefault((trial.batch_size, task.name, len(task.train)), []).append(trial.name)
    for (batch_size, name, rows), names in users.items():
        log.warning(
            "batch_size %d is above the %d training examples of data set %r, so every step takes all of those (used "
            "by %s)", batch_size, rows, name, some(names),
        )  # fmt: skip


def _name(dataset: str, options: Mapping[str, Any], taken: set[str]) -> str:
    if not options:
        return dataset
    name = f"{dataset}({', '.join(f'{key}={value}' for key, value in sorted(options.items()))})"
    assert name not in taken, name
    return name
