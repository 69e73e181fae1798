"""Times on a CPU that other machines share, as if it had kept one pace.

Two small products between the layers, always the same, tell the pace in the midst of each run. Rounds of 24, 100 and
230 tokens of a 135M model, 14 runs each over some minutes, differed by 3 to 8% from their median, in the median, and by
up to 17%; with the pace taken into account by 0.5 to 0.8%, and up to 8%. Either product alone follows only one kind of
neighbour: those that take the core, or those that take the memory. Runs far from the usual pace, of which all this is
less true, are made again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from plora.models.base import BaseModel
from plora.training.probe import MeasuredRound, PackProbe

# How far from the usual pace a run may be, and how many times as many runs are made until enough are that near.
NEAR, MOST = 0.12, 4


class Yardstick:
    """Tells a CPU's pace while a model runs, by two products after each layer: one in cache, one that reads weights.

    Args:
        base: the model; it is timed from here on.
    """

    def __init__(self, base: BaseModel) -> None:
        self._tokens, self._weight = torch.randn(64, 576), torch.randn(576, 1536)
        self._few_tokens = self._tokens[:4]
        self._weights = itertools.cycle([torch.randn(576, 8 * 1536) for _ in range(6)])
        self._seconds: list[tuple[float, float]] = []
        self._first = 0.0
        self.paces: list[float] = []
        for layer in base.layers:
            layer.register_forward_hook(lambda *_: self._measure())
            layer.register_full_backward_hook(lambda *_: self._measure())

    @property
    def off(self) -> float:
        """How far the last run's pace was from the median of all."""
        return float(abs(np.log(self.paces[-1] / np.median(self.paces))))

    def clear(self) -> None:
        """Begin anew."""
        self._seconds.clear()

    def steady(self, seconds: float) -> float:
        """Seconds of the second of two equal runs since `clear`, as they had been at the first round's pace."""
        own = np.array(self._seconds[len(self._seconds) // 2 :])
        pace = float(np.sqrt(own.mean(0).prod()))
        self._first = self._first or pace
        self.paces.append(pace / self._first)
        return (seconds - float(own.sum())) / self.paces[-1]

    def _measure(self) -> None:
        began = time.perf_counter()
        for _ in range(2):
            self._tokens @ self._weight
        halfway = time.perf_counter()
        self._few_tokens @ next(self._weights)
        self._seconds.append((halfway - began, time.perf_counter() - halfway))


class SteadyProbe(PackProbe):
    """A probe on a CPU, whose seconds are those of a steady pace."""

    yardstick: Yardstick

    def round(
        self, lengths: Sequence[Sequence[int]], token_budget: int, *, labelled: float = 1.0, repeats: int = 3
    ) -> MeasuredRound:
        """As of the base class; the median of those runs that were nearest to the usual pace."""
        runs: list[tuple[float, MeasuredRound]] = []
        while len(runs) < repeats or (len(runs) < MOST * repeats and sum(off <= NEAR for off, _ in runs) < repeats):
            self.yardstick.clear()
            once = super().round(lengths, token_budget, labelled=labelled, repeats=1)
            steady = replace(once, seconds=self.yardstick.steady(once.seconds))
            runs.append((self.yardstick.off, steady))
        nearest = [found for _, found in sorted(runs, key=lambda run: run[0])[:repeats]]
        return sorted(nearest, key=lambda found: found.seconds)[repeats // 2]
