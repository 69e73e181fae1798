"""A microbatch as the device sees it, and padded to a shape that others share.

Shapes: ``T`` tokens, ``S`` sequences, ``M`` labelled rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad
from typing_extensions import Self

from plora.data.types import Microbatch
from plora.kernels.schedule import coarse, upload
from plora.models.attention import PackedSequences

# Tokens and labelled rows are padded to whole ones of these, lists of sequences to these.
_ROWS, _SEQUENCES = 64, 8
# What a shape with room takes sequences of; shorter ones cost attention a few empty blocks.
LONG = 512


class Shape(NamedTuple):
    """Sizes of a padded microbatch."""

    tokens: int
    sequences: int
    labels: int
    max_len: int


@dataclass(frozen=True)
class Inputs:
    """What a forward and backward pass reads of a microbatch.

    Args:
        tokens: int64 ``[T]``. positions: likewise, each token's place in its sequence.
        token_index: int32 ``[T]``, each token's place in its adapter's batch.
        cu_seqlens: int32 ``[S + 1]``, starts of the sequences, then ``T``.
        rows: int64 ``[M]``, the labelled rows. labels: likewise, their labels.
        weight: fp32 ``[M]``, of each label in its slot's loss. slots: int64 ``[M]``.
        max_len: at least the longest sequence.
        longest: the longest sequence.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    token_index: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor
    slots: torch.Tensor
    max_len: int
    longest: int

    @classmethod
    def of(cls, microbatch: Microbatch, n_labels: Mapping[int, int]) -> Self:
        """On the host. ``n_labels``: label tokens in each slot's whole batch, by which its losses are divided."""
        # numpy's repeat takes microseconds where torch's takes a millisecond.
        counts = list(microbatch.slot_labels.values())
        slots = np.repeat(np.fromiter(microbatch.slot_labels, np.int64), counts)
        weight = np.repeat(np.array([1 / n_labels[slot] for slot in microbatch.slot_labels], np.float32), counts)
        sequences = PackedSequences.from_lengths(microbatch.lengths)
        rows = microbatch.label_rows
        return cls(
            tokens=microbatch.tokens,
            positions=microbatch.positions,
            token_index=microbatch.token_index,
            cu_seqlens=sequences.cu_seqlens,
            rows=rows,
            labels=microbatch.labels[rows],
            weight=torch.from_numpy(weight),
            slots=torch.from_numpy(slots),
            max_len=sequences.max_len,
            longest=sequences.longest,
        )

    @property
    def sequences(self) -> PackedSequences:
        """The sequences, for attention."""
        return PackedSequences(self.cu_seqlens, self.max_len, (self.longest,))

    def to(self, device: torch.device) -> Self:
        """On ``device``, without waiting for it."""
        moved: dict[str, Any] = {name: upload(tensor, device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def copy_(self, other: Inputs) -> None:
        """Take over the tensors of another, of the same shape and on the host; does not wait for the device."""
        theirs = other._tensors()
        for name, tensor in self._tensors().items():
            source = theirs[name]
            tensor.copy_(source.pin_memory() if tensor.is_cuda else source, non_blocking=True)

    def padded(self, shape: Shape, spare_slot: int) -> Self:
        """Filled up to ``shape``, as `padded_shape` gives it, on the host.

        Further tokens form sequences of their own, which see the base alone. Further labels are of rows that have
        none, each of another, and weigh nothing. Their losses go to ``spare_slot``: those of a diverged adapter's
        rows are not finite, whatever they weigh.
        """
        n_tokens, n_labels = len(self.tokens), len(self.rows)
        more_tokens, more_labels = shape.tokens - n_tokens, shape.labels - n_labels
        starts = torch.arange(n_tokens, shape.tokens, shape.max_len, dtype=torch.int32)[1:]
        cu_seqlens = torch.cat((self.cu_seqlens, starts))
        unlabelled = torch.ones(shape.tokens, dtype=torch.bool)
        unlabelled[self.rows] = False
        fill = unlabelled.nonzero()[:, 0].flip(0)[:more_labels]
        return replace(
            self,
            tokens=pad(self.tokens, (0, more_tokens)),
            positions=pad(self.positions, (0, more_tokens)),
            token_index=pad(self.token_index, (0, more_tokens)),
            cu_seqlens=pad(cu_seqlens, (0, shape.sequences + 1 - len(cu_seqlens)), value=shape.tokens),
            rows=torch.cat((self.rows, fill)),
            labels=pad(self.labels, (0, more_labels)),
            weight=pad(self.weight, (0, more_labels)),
            slots=pad(self.slots, (0, more_labels), value=spare_slot),
            max_len=shape.max_len,
        )

    def padded_shape(self) -> Shape:
        """The shape that these fit into, among eight an octave."""
        max_len = 1 << (self.max_len - 1).bit_length()
        return self._shape(coarse(len(self.tokens)), coarse(len(self.rows)), max_len)

    def roomy_shape(self) -> Shape:
        """One that similar microbatches fit into too: an eighth more of everything, and longer sequences."""
        tokens, labels = (coarse(count + count // 8) for count in (len(self.tokens), len(self.rows)))
        return self._shape(tokens, labels, max(LONG, 1 << (self.max_len - 1).bit_length()), room=1.5)

    def fits(self, shape: Shape) -> bool:
        """Whether these can be padded to a shape."""
        tokens, labels = len(self.tokens) <= shape.tokens, len(self.rows) <= shape.labels
        lengths = self.max_len <= shape.max_len
        return tokens and labels and lengths and self._sequences_at(shape.tokens, shape.max_len) <= shape.sequences

    def _shape(self, tokens: int, labels: int, max_len: int, room: float = 1.0) -> Shape:
        tokens = _whole(tokens, _ROWS)
        sequences = coarse(int(room * self._sequences_at(tokens, max_len)))
        return Shape(tokens, _whole(sequences, _SEQUENCES), min(tokens, _whole(labels, _ROWS)), max_len)

    def _sequences_at(self, tokens: int, max_len: int) -> int:
        """Sequences, those that padding to so many tokens adds included."""
        return len(self.cu_seqlens) - 1 - (len(self.tokens) - tokens) // max_len

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _whole(number: int, step: int) -> int:
    return -(-number // step) * step
