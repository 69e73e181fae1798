"""Keys and values of generation: every row has its own length, no padding is attended to.

Shapes: ``N`` rows, ``H`` query heads, ``G`` key and value heads, ``L`` cached tokens, ``E`` head features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from plora.models.attention import PackedSequences, packed_attention


class KVCache:
    """Keys and values of ``rows`` sequences in generation.

    Fill it with `prefill`, then extend all rows by one token with each `decode`:

        hidden = base.hidden_states(prompt_tokens, positions, cache.prefill(sequences))
        hidden = base.hidden_states(next_tokens, cache.lengths, cache.decode())

    Storage is allocated by the first layer that writes, as zeros, so that attention may read what no row has reached
    yet and mask it. Rows that are finished are dropped with `select`; until then the lengths and the storage keep
    their place, so that decoding can be captured as a CUDA graph.

    Args:
        rows: sequences.
        max_len: tokens a row can hold, prompt included.
        device: where the model runs.
    """

    def __init__(self, rows: int, max_len: int, device: torch.device | str = "cpu") -> None:
        self.max_len = max_len
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.host_lengths = [0] * rows
        self._storage: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def rows(self) -> int:
        """Sequences still in the cache."""
        return len(self.host_lengths)

    def prefill(self, sequences: PackedSequences, rows: Sequence[int] | None = None) -> Prefill:
        """The view to run prompts with; ``rows`` are the rows they fill, all in order where None.

        Raises:
            ValueError: if a prompt is longer than the cache, or their number differs from the rows'.
        """
        rows = list(range(self.rows)) if rows is None else list(rows)
        if len(rows) != len(sequences.lengths):
            raise ValueError(f"{len(sequences.lengths)} prompts for {len(rows)} rows of the cache")
        if sequences.longest > self.max_len:
            raise ValueError(f"a prompt of {sequences.longest} tokens exceeds the cache's {self.max_len}")
        lengths = torch.tensor(sequences.lengths)
        token_rows = torch.tensor(rows).repeat_interleave(lengths).to(self.lengths.device)
        return Prefill(self, sequences, rows, token_rows, sequences.positions().to(self.lengths.device))

    def decode(self, attended: int | None = None) -> Decode:
        """The view to run one further token of every row with, at ``positions = cache.lengths``.

        Args:
            attended: cached positions to attend over, those that a row has not reached masked. Default: as many as
                the longest row will have.

        Raises:
            ValueError: if a row is full, or ``attended`` is less than the longest row will have or more than there are.
        """
        longest = max(self.host_lengths) + 1
        if longest > self.max_len:
            raise ValueError(f"a row of the cache is full at {self.max_len} tokens")
        attended = longest if attended is None else attended
        if not longest <= attended <= self.max_len:
            raise ValueError(f"attended must be from {longest} to {self.max_len} positions, got {attended}")
        seen = torch.arange(attended, device=self.lengths.device) <= self.lengths[:, None]
        return Decode(self, attended, seen[:, None, None])

    def count_token(self) -> None:
        """Counts one token more of every row on the host, where a replayed graph has done so on the device."""
        self.host_lengths = [length + 1 for length in self.host_lengths]

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the given rows, in the given order."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.lengths.device)
        self.lengths = self.lengths[index]
        self.host_lengths = [self.host_lengths[row] for row in rows]
        # One layer at a time, so that the peak is one layer's copy.
        for layer, (keys, values) in self._storage.items():
            self._storage[layer] = (keys[index], values[index])

    def storage(self, layer: nn.Module, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[N, G, max_len, E]`` of an attention layer."""
        if layer not in self._storage:
            shape = (self.rows, key.shape[1], self.max_len, key.shape[2])
            self._storage[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        return self._storage[layer]


@dataclass(frozen=True, eq=False)
class Prefill:
    """Prompts as a packed run; their keys and values are stored."""

    cache: KVCache
    sequences: PackedSequences
    rows: list[int]
    token_rows: torch.Tensor
    positions: torch.Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest row once this has run."""
        return self.sequences.longest

    def attend(
        self, layer: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attention of ``[T, H, E]`` within the prompts."""
        keys, values = self.cache.storage(layer, key)
        keys[self.token_rows, :, self.positions] = key
        values[self.token_rows, :, self.positions] = value
        return packed_attention(query, key, value, self.sequences.cu_seqlens, self.sequences.max_len, scale)

    def finish(self) -> None:
        """Records the lengths; called once all layers have run."""
        for row, length in zip(self.rows, self.sequences.lengths, strict=True):
            self.cache.host_lengths[row] = length
        self.cache.lengths = torch.tensor(self.cache.host_lengths, device=self.cache.lengths.device)


@dataclass(frozen=True, eq=False)
class Decode:
    """One token of every row; ``seen`` is ``[N, 1, 1, L]``, true where a row has a token."""

    cache: KVCache
    longest: int
    seen: torch.Tensor

    def attend(
        self, layer: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """Attention of one query a row ``[N, H, E]`` over the row's cached tokens and its own."""
        keys, values = self.cache.storage(layer, key)
        every = torch.arange(len(query), device=query.device)
        keys[every, :, self.cache.lengths] = key
        values[every, :, self.cache.lengths] = value
        # The query heads that share a key head become that head's query positions: nothing is expanded.
        grouped = query.unflatten(1, (key.shape[1], -1))
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
        out = F.scaled_dot_product_attention(
            grouped, keys[:, :, : self.longest], values[:, :, : self.longest], attn_mask=self.seen, scale=scale
        )
        return out.flatten(1, 2)

    def finish(self) -> None:
        """Counts the token; called once all layers have run."""
        self.cache.lengths.add_(1)
        self.cache.count_token()
