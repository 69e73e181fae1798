"""One LoRA configuration together with the settings it is trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plora.modules.config import AdapterConfig

DEFAULT_TRIAL = "default"
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Trial:
    """A point of the search space, complete: nothing about its training is decided elsewhere.

    Args:
        number: the trial's number in the Optuna study.
        name: unique and safe as a directory name: ``"default"`` or ``"t007"``.
        adapter: the LoRA settings.
        lr: peak learning rate of A, and of B when ``loraplus_ratio`` is 1.
        batch_size: examples per optimizer step.
        epochs: passes over the training examples; None where ``max_steps`` is given.
        max_steps: optimizer steps; None where ``epochs`` is given.
        schedule: what the learning rate does after warm-up: ``constant``, ``linear`` or
            ``cosine`` (both to zero at the last step).
        warmup_fraction: part of the steps over which the rate rises linearly from zero.
        warmup_steps: the same in steps; takes the place of ``warmup_fraction`` where given.
        weight_decay: AdamW's decoupled decay.
        betas: AdamW's decay rates of the first and second moment.
        eps: AdamW's denominator guard.
        max_grad_norm: threshold of this adapter's own gradient norm; None switches clipping off.
        loraplus_ratio: learning rate of B over that of A (LoRA+, arXiv 2402.12354).
        seed: order of the examples, initialisation and dropout.
        dataset: name of the data set in the sweep's ``datasets``.
        dataset_options: data set settings that this trial overrides, e.g. ``{"max_examples": 500}``.
        params: the settings that the search chose for it, as stored in the study.
    """

    number: int
    name: str
    adapter: AdapterConfig
    lr: float = 2e-4
    batch_size: int = 16
    epochs: float | None = 1.0
    max_steps: int | None = None
    schedule: str = "cosine"
    warmup_fraction: float = 0.03
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    loraplus_ratio: float = 1.0
    seed: int = 0
    dataset: str = "dataset"
    dataset_options: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)

    def total_steps(self, n_examples: int) -> int:
        """Optimizer steps this trial takes over a training set of ``n_examples``."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.epochs is not None
        steps_per_epoch = -(-n_examples // self.batch_size)
        return max(1, round(self.epochs * steps_per_epoch))
