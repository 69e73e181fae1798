"""Decode steps of packed generation, one more token for every row, as CUDA graphs where the CUDA kernels run.

A step's kernels take the host several times longer to launch than they take the device to run. So a step is made of
tensors that keep their place: it reads each row's last token and length, and writes the next ones there. It attends
over a fixed number of cached positions, of which a mask made on the device hides those that a row has not reached.
Then one graph serves many steps, until rows leave, which moves the cache, or until they outgrow these positions.

Shapes: ``N`` rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from plora.models.base import BaseModel
from plora.models.cache import KVCache
from plora.modules.packed import PackedAdapters
from plora.training.graphs import capture

log = logging.getLogger(__name__)

# A batch is compacted when this share of its rows has finished: each time copies the cache.
_COMPACT_SHARE = 1 / 8
# With graphs it also costs an eager step and a capture, as long as ten or twenty replays, and saves little: whatever
# the rows, a step reads all weights. So the batch has to halve, and this many steps have to profit.
_COMPACT_SHARE_GRAPHS, _COMPACT_STEPS = 1 / 2, 64
# By how many the cached positions that one graph attends over grow. Up to so many attended to in vain take a step
# tenths of a millisecond, with the largest caches; another graph takes as long as ten or twenty steps.
_SPACING = 256
# Capturing takes the host about as long as two eager steps, and empties torch's cache of memory: so many steps at least
# have to profit.
_CAPTURE_STEPS = 8


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Run it on the device."""


def can_capture(base: BaseModel, packed: PackedAdapters) -> bool:
    """Whether decode steps run as CUDA graphs: where the CUDA kernels run, which read all that differs from tensors."""
    return packed.work_counts is not None and base.device.type == "cuda"


class Decoder:
    """Runs the decode steps of one `generate` call.

    Where one cannot be captured, all further steps run eagerly.

    Args:
        base: the base model.
        packed: the adapters on it.
    """

    def __init__(self, base: BaseModel, packed: PackedAdapters) -> None:
        self.base = base
        self.uses_graphs = can_capture(base, packed)

    def pays_to_compact(self, rows: int, finished: int, left: int) -> bool:
        """Whether to drop the finished ones among rows of which some have ``left`` steps to go."""
        if self.uses_graphs:
            return finished >= _COMPACT_SHARE_GRAPHS * rows and left >= _COMPACT_STEPS
        return finished >= _COMPACT_SHARE * rows

    @contextmanager
    def steps(self, cache: KVCache, tokens: torch.Tensor) -> Iterator[Steps]:
        """Steps of the rows in a cache. Use within one route: a graph is good for that one alone.

        Args:
            cache: that of the prompts.
            tokens: int64 ``[N]``, the last one of each row; overwritten.
        """
        steps = Steps(self, cache, tokens)
        try:
            yield steps
        finally:
            # The next to need memory is a copy of the cache, or the cache of another batch.
            steps.release()

    def attended(self, needed: int, max_len: int) -> int:
        """Cached positions to attend over where ``needed`` have to be, and a row holds at most ``max_len``."""
        if not self.uses_graphs:
            return needed
        # Counted from the end: an answer of up to `_SPACING` tokens then takes one graph.
        return max_len - (max_len - needed) // _SPACING * _SPACING


class Steps:
    """Decode steps of rows that stay the same; see `Decoder.steps`."""

    def __init__(self, decoder: Decoder, cache: KVCache, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self._decoder, self._cache = decoder, cache
        self._attended = 0
        self._has_run = False
        self._graph: Graph | None = None

    def run(self, left: int) -> torch.Tensor:
        """Add a token to every row and return them, int64 ``[N]``; the next step overwrites them.

        Args:
            left: most steps that any row will still take, this one included.

        Raises:
            ValueError: if a row of the cache is full.
        """
        needed = max(self._cache.host_lengths) + 1
        if needed > self._attended:
            self.release()
            self._attended = self._decoder.attended(needed, self._cache.max_len)
        if self._graph is None and self._is_worth_capturing(min(left, self._attended - needed + 1)):
            self._capture()
        if self._graph is None:
            self._step()
            self._has_run = True
        else:
            self._graph.replay()
            self._cache.count_token()
        return self.tokens

    def release(self) -> None:
        """Give the graph's memory back."""
        self._graph, self._has_run = None, False

    def _is_worth_capturing(self, steps: int) -> bool:
        # A capture must meet nothing that is compiled, loaded or planned when it first runs at these shapes.
        return self._decoder.uses_graphs and self._has_run and steps >= _CAPTURE_STEPS

    def _step(self) -> None:
        """All of a step: what is captured."""
        base, cache = self._decoder.base, self._cache
        hidden = base.hidden_states(self.tokens, cache.lengths, cache.decode(self._attended))
        self.tokens.copy_(base.logits(hidden).argmax(dim=-1))

    def _capture(self) -> None:
        # The graph's pool of memory holds what an eager step takes for a while: activations and logits of one token a
        # row, which is megabytes. torch gives back what that step has left in its cache before the capture, so the
        # memory model, which plans the cache and the logits, need not know of it.
        lengths = self._cache.host_lengths
        try:
            self._graph = capture(self._step, self._decoder.base.device)
        except RuntimeError as error:  # running out of memory is one
            self._decoder.uses_graphs = False
            log.warning("generation goes on without CUDA graphs: %s", str(error).partition("\n")[0])
        finally:
            # The step has counted on the host a token that the device has not made.
            self._cache.host_lengths = lengths
