"""Greedy generation for many adapters in one batch, each row with its own.

Rows of similar prompt length share a batch, whatever their adapters, and lie in order of their slots
as routing wants it. Finished rows leave where that pays, so that the batch shrinks instead of computing on nothing.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch

from plora.models.attention import PackedSequences
from plora.models.base import BaseModel
from plora.models.cache import KVCache
from plora.modules.packed import PackedAdapters
from plora.training.budget import TokenBudget
from plora.training.decoding import Decoder
from plora.training.evaluation import BASE

_PREFILL_TOKENS = 8192


@dataclass(frozen=True, eq=False)
class Prompt:
    """What one row continues.

    Args:
        subject: slot of the adapter that answers, or ``BASE``.
        tokens: the prompt, header of the answer included.
    """

    subject: int
    tokens: Sequence[int] | np.ndarray


@dataclass(eq=False)
class _Row:
    index: int
    prompt: Prompt
    limit: int
    generated: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def longest(self) -> int:
        """Tokens that the cache may have to hold for it: the last one generated is never read back."""
        return len(self.prompt.tokens) + self.limit - 1

    def accept(self, token: int, stop: frozenset[int]) -> None:
        """Take the next token; a stop token ends the row and is no part of its text."""
        if self.finished:
            return
        if token in stop:
            self.finished = True
            return
        self.generated.append(token)
        self.finished = len(self.generated) == self.limit


@torch.no_grad()
def generate(
    base: BaseModel,
    packed: PackedAdapters,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop: Sequence[int],
    cache_budget: TokenBudget,
) -> list[list[int]]:
    """Greedy continuations, dropout off. A row's result does not depend on the others, last bits apart.

    Args:
        base: the base model.
        packed: the adapters on it.
        prompts: one per row, in any order.
        max_new_tokens: at most so many tokens a row; fewer where the model's positions end.
        stop: tokens that end a row; left out of the result.
        cache_budget: tokens that the key-value cache of one batch of rows may hold.

    Returns:
        New token ids of each prompt, in the order of ``prompts``.

    Raises:
        ValueError: if a prompt is empty or leaves no position for an answer, or ``max_new_tokens`` is below one.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    rows = [_Row(i, prompt, _limit(base, prompt, max_new_tokens)) for i, prompt in enumerate(prompts)]
    waiting = sorted(rows, key=lambda row: (-row.longest, row.index))
    decoder = Decoder(base, packed)
    while waiting:
        attempt = functools.partial(_attempt, decoder, packed, waiting, frozenset(stop))
        waiting = cache_budget.run(attempt, smallest=waiting[0].longest)
    return [row.generated for row in rows]


def _limit(base: BaseModel, prompt: Prompt, max_new_tokens: int) -> int:
    positions = base.spec.longest_sequence
    room = positions - len(prompt.tokens) + 1
    if not len(prompt.tokens) or room < 1:
        raise ValueError(
            f"a prompt of {len(prompt.tokens)} tokens cannot be continued: it must have 1 to {positions} tokens, "
            f"the positions of {base.spec.name}"
        )
    return min(max_new_tokens, room)


def _attempt(
    decoder: Decoder, packed: PackedAdapters, waiting: list[_Row], stop: frozenset[int], cache_tokens: int
) -> list[_Row]:
    """Finish the first rows of ``waiting``, as many as the cache may hold, and return the others."""
    n = max(1, min(len(waiting), cache_tokens // waiting[0].longest))
    rows = sorted(waiting[:n], key=lambda row: (row.prompt.subject == BASE, row.prompt.subject, row.index))
    for row in rows:  # an attempt that ran out of memory may have begun them
        row.generated, row.finished = [], False
    _run_batch(decoder, packed, rows, stop)
    return waiting[n:]


def _run_batch(decoder: Decoder, packed: PackedAdapters, rows: list[_Row], stop: frozenset[int]) -> None:
    base = decoder.base
    cache = KVCache(len(rows), max(row.longest for row in rows), base.device)
    tokens = _prefill(base, packed, rows, cache)
    _accept(rows, tokens, stop)
    while kept := [i for i, row in enumerate(rows) if not row.finished]:
        if len(kept) < len(rows):
            cache.select(kept)
            rows, tokens = [rows[i] for i in kept], tokens[torch.tensor(kept, device=tokens.device)]
        # One route serves all steps until a row leaves: the rows of a step stay the same.
        with _route(packed, Counter(row.prompt.subject for row in rows)), decoder.steps(cache, tokens) as steps:
            while not _is_time_to_compact(rows, cache, decoder):
                _accept(rows, steps.run(_steps_left(rows)), stop)


def _is_time_to_compact(rows: Sequence[_Row], cache: KVCache, decoder: Decoder) -> bool:
    finished = sum(row.finished for row in rows)
    if not finished or finished == len(rows):
        return finished > 0
    # A finished row that still takes part must not run over the end of the cache.
    is_full = max(cache.host_lengths) == cache.max_len
    return is_full or decoder.pays_to_compact(len(rows), finished, _steps_left(rows))


def _steps_left(rows: Sequence[_Row]) -> int:
    """Most steps that any row will still take."""
    return max(row.limit - len(row.generated) for row in rows if not row.finished)


def _prefill(base: BaseModel, packed: PackedAdapters, rows: Sequence[_Row], cache: KVCache) -> torch.Tensor:
    """Run all prompts, a bounded number of tokens at a time; the first new token of each row ``[N]``."""
    parts = []
    for first, last in _pieces([len(row.prompt.tokens) for row in rows]):
        prompts = [row.prompt for row in rows[first:last]]
        lengths = [len(prompt.tokens) for prompt in prompts]
        sequences = PackedSequences.from_lengths(lengths, base.device)
        flat = torch.cat([torch.as_tensor(prompt.tokens, dtype=torch.int64) for prompt in prompts]).to(base.device)
        counts: Counter[int] = Counter()
        for prompt in prompts:
            counts[prompt.subject] += len(prompt.tokens)
        with _route(packed, counts):
            hidden = base.hidden_states(flat, sequences.positions(), cache.prefill(sequences, range(first, last)))
        parts.append(base.logits(hidden[sequences.cu_seqlens[1:].long() - 1]).argmax(dim=-1))
    return torch.cat(parts)


def _pieces(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of rows of at most ``_PREFILL_TOKENS`` tokens, or of one row."""
    first, total = 0, 0
    for i, length in enumerate(lengths):
        if i > first and total + length > _PREFILL_TOKENS:
            yield first, i
            first, total = i, 0
        total += length
    yield first, len(lengths)


def _route(packed: PackedAdapters, counts: Mapping[int, int]) -> AbstractContextManager[None]:
    adapters = {subject: count for subject, count in counts.items() if subject != BASE}
    return packed.route(adapters, base_tokens=counts.get(BASE, 0), dropout=False)


def _accept(rows: Sequence[_Row], tokens: torch.Tensor, stop: frozenset[int]) -> None:
    for row, token in zip(rows, tokens.tolist(), strict=True):
        row.accept(token, stop)
