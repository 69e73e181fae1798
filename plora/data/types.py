"""The values that flow from data to training: examples, tasks and packed microbatches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenized example, already shifted: position ``i`` predicts ``labels[i]``.

    Args:
        inputs: int32 ``[L]``, every token but the last.
        labels: int32 ``[L]``, the next token where it is trained on, else ``IGNORE_INDEX``.
        prompt: int32 ``[P]``, the tokens that generation starts from (header of the answer included).
        answer: the reference text.
        fields: the row it came from, for metrics and the predictions file.
        messages: the conversation up to the answer, from which other answers can be encoded.
    """

    inputs: np.ndarray
    labels: np.ndarray
    prompt: np.ndarray
    answer: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def n_labels(self) -> int:
        """Positions that contribute to the loss."""
        return int((self.labels != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Task:
    """A data set as a trial sees it: what it trains on, what chooses, what is scored once."""

    name: str
    train: list[Example]
    val: list[Example]
    test: list[Example]


@dataclass
class Microbatch:
    """A flat run of whole sequences, sorted by slot (the adapter's place in the pack).

    ``T`` tokens, ``S`` sequences. Tensors are on the host until ``to`` is called.

    Args:
        tokens: int64 ``[T]``.
        positions: int64 ``[T]``, position of the token within its sequence.
        labels: int64 ``[T]``, ``IGNORE_INDEX`` where not trained on.
        token_index: int32 ``[T]``, index of the token within its trial's own batch. It keys the
            dropout mask, so it does not depend on who shares the microbatch.
        lengths: tokens of each sequence, ``S`` of them.
        slot_tokens: tokens of each slot, ascending slots; slots without tokens are left out.
        label_rows: int64 ``[M]``, the rows whose label is not ignored, ascending.
        slot_labels: labelled rows of each slot in this microbatch; the keys are ``slot_tokens``'.
        sources: slot and index in the slot's batch of each sequence, ``S`` of them.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    token_index: torch.Tensor
    lengths: list[int]
    slot_tokens: dict[int, int]
    label_rows: torch.Tensor
    slot_labels: dict[int, int]
    sources: list[tuple[int, int]] = field(default_factory=list)

    def to(self, device: torch.device | str) -> Microbatch:
        """The same microbatch with its tensors on ``device``."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("tokens", "positions", "labels", "token_index", "label_rows")
        }
        return replace(self, **moved)
