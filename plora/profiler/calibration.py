"""What to measure on a device that no profile is stored for: a pack, and a few rounds of it that differ in everything.

A round is chosen for the coefficient that it tells apart: the launch floor, ranks, the number of adapters, labels,
attention, microbatches. Sizes follow from the estimate, so that a round takes about half a second on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plora.profiler.memory import MemoryModel
from plora.profiler.time import StepCost

# Ranks of the adapters measured, best choice first: the first that fits and whose optimizer step is short.
PACKS = (
    (8, 8, 8, 8, 8, 8, 16, 16, 16, 16, 32, 32, 64, 128),
    (8, 8, 8, 8, 16, 16, 32, 64),
    (8, 8, 16, 32),
    (8, 8),
    (8,),
)
ROUND_SECONDS = 0.5
OPTIMIZER_SECONDS = 0.1
# Tokens of a full round, at least and at most. A CPU's estimate knows nothing of what a layer costs beside arithmetic.
SMALLEST = 128
LARGEST = {"cuda": 32768, "cpu": 1024}
SHORT, MIDDLE, LONG = 64, 256, 1024
# Rounds are as uneven as those to be predicted, or they would fill whole tiles of the device, which others seldom do:
# sequences' lengths and adapters' tokens as parts of the largest, and a round's tokens as a part of a round number.
# Single adapters' small rounds are not near a power of two either, of which matrix products make the most: 512 tokens
# take a tenth less than the line through fewer and more.
RAGGED = (0.93, 0.5, 0.79, 0.36, 1.0, 0.64, 0.79, 0.71)
UNEVEN = 0.93


@dataclass(frozen=True)
class CalibrationRound:
    """A round to measure.

    Args:
        lengths: by adapter, the tokens of each of its sequences; empty for one that sits out.
        token_budget: most tokens of a microbatch.
        labelled: part of each sequence that is labelled.
    """

    lengths: tuple[tuple[int, ...], ...]
    token_budget: int
    labelled: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of all adapters."""
        return sum(map(sum, self.lengths))


@dataclass(frozen=True)
class Calibration:
    """A pack and its rounds, in the order in which they are measured: what matters most comes first."""

    ranks: tuple[int, ...]
    rounds: tuple[CalibrationRound, ...]


def calibration_rounds(memory: MemoryModel, cost: StepCost, free_bytes: int) -> Calibration | None:
    """What to measure; None where not even the smallest pack fits.

    Args:
        memory: the memory model.
        cost: the estimate to be corrected.
        free_bytes: bytes that the pack may take, base included.
    """
    for ranks in PACKS:
        size = sum(memory.adapter_bytes(rank) for rank in ranks)
        params = sum(memory.adapter_params(rank) for rank in ranks)
        tokens = _round_tokens(memory, cost, free_bytes - size, max(ranks))
        is_light = params * cost.per_param <= OPTIMIZER_SECONDS and size <= free_bytes // 4
        if tokens and (is_light or ranks == PACKS[-1]):
            spec = memory.spec
            longest = min(LONG, spec.longest_sequence)
            return Calibration(ranks, tuple(dict.fromkeys(_rounds(len(ranks), tokens, longest))))
    return None


def _round_tokens(memory: MemoryModel, cost: StepCost, free_bytes: int, max_rank: int) -> int:
    """Tokens of a full round: the largest power of two that takes no longer than it should, and fits; 0 for none."""
    tokens = LARGEST[memory.device]
    while tokens >= SMALLEST:
        seconds = tokens * (cost.per_token + cost.per_label)
        fits = memory.adapter_room(free_bytes, tokens, max_rank) >= 0
        if fits and (seconds <= 1.5 * ROUND_SECONDS or tokens == SMALLEST):
            return tokens
        tokens //= 2
    return 0


def _rounds(count: int, unit: int, longest: int) -> list[CalibrationRound]:
    short, middle = min(SHORT, longest), min(MIDDLE, longest)
    everyone, first, last = range(count), [0], [count - 1]
    few = range(0, count, max(1, count // 4))
    return [
        _round(count, first, 3 * unit // 128, short, unit),
        _round(count, everyone, unit, middle, unit),
        _round(count, everyone, unit // 4, short, unit),
        _round(count, first, unit // 4, middle, unit),
        _round(count, everyone, unit, middle, unit, labelled=0.25),
        _round(count, last, unit // 2, middle, unit),
        _round(count, first, unit, min(longest, unit // 2), unit),
        _round(count, everyone, 2 * unit, min(middle, unit), unit),
        _round(count, few, unit // 2, short, unit),
        _round(count, first, 3 * unit // 32, short, unit),
        _round(count, few, unit // 8, short, unit),
        # Small ones, which take no time: where a round begins to cost more than its launches and its adapters' state.
        _round(count, last, short, short, unit),
        _round(count, everyone, max(count, unit // 32), short, unit),
        _round(count, few, 3 * unit // 32, middle, unit),
        _round(count, few, 2 * short, short, unit),
        _round(count, [0, count // 2][: len(few)], 12 * short, min(2 * middle, longest, unit), unit, labelled=0.5),
        _round(count, first, short, short, unit),
        # Another part of full than the others: matrix products work in whole waves, and some sizes suit them less.
        _round(count, [count // 2], unit, short, unit, part=0.98),
    ]


def _round(
    count: int, slots: Sequence[int], tokens: int, length: int, token_budget: int, labelled: float = 1.0,
    part: float = UNEVEN,
) -> CalibrationRound:  # fmt: skip
    """``part`` of ``tokens`` spread over the adapters ``slots``, in sequences of at most ``length``."""
    weights = [RAGGED[i % len(RAGGED)] for i in range(len(slots))]
    lengths: list[tuple[int, ...]] = [()] * count
    for slot, weight in zip(slots, weights, strict=True):
        lengths[slot] = _sequences(max(2, round(part * tokens * weight / sum(weights))), length)
    return CalibrationRound(tuple(lengths), token_budget, labelled)


def _sequences(tokens: int, longest: int) -> tuple[int, ...]:
    """Lengths from two to ``longest`` that add up to ``tokens``."""
    found: list[int] = []
    while tokens:
        length = min(tokens, max(2, round(longest * RAGGED[len(found) % len(RAGGED)])))
        if tokens == length + 1:  # none of one token
            length = length - 1 if length > 2 else tokens
        found.append(length)
        tokens -= length
    return tuple(found)
