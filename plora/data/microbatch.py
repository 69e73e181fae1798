"""Turns the batches of many slots into few, even, flat microbatches under a token budget.

Shape letters: ``S`` sequences, ``T`` tokens, ``K`` microbatches.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from plora.data.types import IGNORE_INDEX, Example, Microbatch


def pack(batches: Mapping[int, Sequence[Example]], token_budget: int) -> list[Microbatch]:
    """Splits one batch per slot into balanced microbatches of whole sequences.

    As few microbatches as can be found under the budget, of even token counts. Where it costs no
    further microbatch, a slot's sequences stay together, so that its factors are read and its
    gradient is written in as few microbatches as possible.

    Args:
        batches: each slot's batch, in the order its stream gave it; empty ones are left out.
        token_budget: most tokens of a microbatch. A longer sequence gets a microbatch of its own.

    Returns:
        Microbatches sorted by slot inside; every example of every batch is in exactly one.

    Raises:
        ValueError: if ``token_budget`` is below one.
    """
    sources = [(slot, index) for slot in sorted(batches) for index in range(len(batches[slot]))]
    return _pack(batches, sources, token_budget)


def pack_eval(batches: Mapping[int, Sequence[Example]], token_budget: int) -> list[Microbatch]:
    """The same for evaluation: each slot's sequences go longest first.

    Sequences of equal length then share a microbatch, which the CPU's attention runs in one call.
    ``Microbatch.sources`` says which example each sequence is.
    """
    sources = [
        (slot, index)
        for slot in sorted(batches)
        for index in sorted(range(len(batches[slot])), key=lambda i, b=batches[slot]: -len(b[i]))  # type: ignore[misc]
    ]
    return _pack(batches, sources, token_budget)


def _pack(
    batches: Mapping[int, Sequence[Example]], sources: list[tuple[int, int]], token_budget: int
) -> list[Microbatch]:
    if token_budget < 1:
        raise ValueError(f"the token budget of a microbatch must be at least 1, got {token_budget}")
    if not sources:
        return []
    offsets = {slot: np.cumsum([0] + [len(e) for e in batch]) for slot, batch in batches.items()}
    lengths = np.array([len(batches[slot][index]) for slot, index in sources])
    assert lengths.min() > 0, "an example needs at least one token"
    bins = _by_first_sequence(_assign(lengths, token_budget))
    order = np.argsort(bins, kind="stable")
    sources = [sources[i] for i in order]
    examples = [batches[slot][index] for slot, index in sources]
    offset_in_batch = np.array([offsets[slot][index] for slot, index in sources])
    ends = np.cumsum(np.bincount(bins))
    return _concatenate(examples, sources, lengths[order], offset_in_batch, ends.tolist())


def _concatenate(
    examples: list[Example],
    sources: list[tuple[int, int]],
    lengths: np.ndarray,
    offset_in_batch: np.ndarray,
    ends: list[int],
) -> list[Microbatch]:
    """Flat tensors of all sequences, cut after the sequences ``ends``."""
    starts = np.cumsum(lengths) - lengths
    row = np.arange(int(lengths.sum()))
    positions = row - np.repeat(starts, lengths)
    token_index = (positions + np.repeat(offset_in_batch, lengths)).astype(np.int32)
    tokens = np.concatenate([e.inputs for e in examples], dtype=np.int64)
    labels = np.concatenate([e.labels for e in examples], dtype=np.int64)
    labelled = labels != IGNORE_INDEX
    n_labels = np.add.reduceat(labelled, starts, dtype=np.int64)
    microbatches = []
    for first, last in zip([0, *ends], ends, strict=False):
        rows = slice(int(starts[first]), int(starts[last - 1] + lengths[last - 1]))
        slots = [slot for slot, _ in sources[first:last]]
        microbatches.append(
            Microbatch(
                tokens=torch.from_numpy(tokens[rows]),
                positions=torch.from_numpy(positions[rows]),
                labels=torch.from_numpy(labels[rows]),
                token_index=torch.from_numpy(token_index[rows]),
                lengths=lengths[first:last].tolist(),
                slot_tokens=_sum_by_slot(slots, lengths[first:last]),
                label_rows=torch.from_numpy(np.flatnonzero(labelled[rows])),
                slot_labels=_sum_by_slot(slots, n_labels[first:last]),
                sources=sources[first:last],
            )
        )
    return microbatches


def _sum_by_slot(slots: list[int], values: np.ndarray) -> dict[int, int]:
    total: dict[int, int] = {}
    for slot, value in zip(slots, values.tolist(), strict=True):
        total[slot] = total.get(slot, 0) + value
    return total


def _by_first_sequence(bins: np.ndarray) -> np.ndarray:
    """Renumbers bins 0, 1, ... in the order of their first sequence."""
    _, first, inverse = np.unique(bins, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _assign(lengths: np.ndarray, budget: int) -> np.ndarray:
    """The microbatch of each sequence, ``[S]``; sequences above the budget are alone in theirs."""
    bins = np.empty(len(lengths), dtype=np.int64)
    small = lengths <= budget
    n_alone = int((~small).sum())
    bins[~small] = np.arange(n_alone)
    if n_alone < len(lengths):
        bins[small] = n_alone + _fewest_even(lengths[small], budget)
    return bins


def _fewest_even(lengths: np.ndarray, budget: int) -> np.ndarray:
    """Even bins at the lower bound of their number if that works, else at best fit's number."""
    at_least = max(-(-int(lengths.sum()) // budget), int((2 * lengths > budget).sum()))
    deals: tuple[Callable[[np.ndarray, int], np.ndarray], ...] = (_in_order, _longest_first)
    for deal in deals:
        bins = deal(lengths, at_least)
        if _largest(bins, lengths) <= budget:
            return bins
    tight = _best_fit(lengths, budget)
    n_bins = int(tight.max()) + 1
    for deal in deals:
        bins = deal(lengths, n_bins)
        if _largest(bins, lengths) <= budget:
            return bins
    return tight


def _largest(bins: np.ndarray, lengths: np.ndarray) -> int:
    return int(np.bincount(bins, weights=lengths).max())


def _in_order(lengths: np.ndarray, n_bins: int) -> np.ndarray:
    """Consecutive runs: a sequence goes where its middle token falls among ``n_bins`` equal parts."""
    twice_middle = 2 * np.cumsum(lengths) - lengths
    return twice_middle * n_bins // (2 * int(lengths.sum()))


def _longest_first(lengths: np.ndarray, n_bins: int) -> np.ndarray:
    """Longest processing time first: the longest remaining sequence joins the emptiest bin."""
    bins = np.empty(len(lengths), dtype=np.int64)
    loads = [(0, b) for b in range(n_bins)]
    values = lengths.tolist()
    for i in np.argsort(-lengths, kind="stable").tolist():
        load, b = loads[0]
        bins[i] = b
        heapq.heapreplace(loads, (load + values[i], b))
    return bins


def _best_fit(lengths: np.ndarray, budget: int) -> np.ndarray:
    """Best fit decreasing: the longest remaining sequence joins the fullest bin that still takes it."""
    bins = np.empty(len(lengths), dtype=np.int64)
    free: list[tuple[int, int]] = []  # sorted (tokens left, bin)
    values = lengths.tolist()
    n_bins = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        at = bisect_left(free, (values[i], -1))
        if at == len(free):
            left, b, n_bins = budget, n_bins, n_bins + 1
        else:
            left, b = free.pop(at)
        bins[i] = b
        insort(free, (left - values[i], b))
    return bins
