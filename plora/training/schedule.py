"""How the learning rate moves over a trial's own steps."""

from __future__ import annotations

import math

from plora.search.trial import SCHEDULES


def warmup_steps(total: int, fraction: float) -> int:
    """Steps over which the rate rises, at least one where a fraction is given (as Hugging Face's trainer counts)."""
    return math.ceil(total * fraction)


def lr_factor(step: int, total: int, warmup: int, kind: str) -> float:
    """The factor on the peak learning rate for the update after ``step`` updates.

    Equal to transformers' ``get_{constant,linear,cosine}_schedule_with_warmup``: the first update of
    a warm-up has rate zero, and the decay would reach zero at update ``total``, one after the last.

    Args:
        step: updates already made, 0 for the first.
        total: updates of the whole training.
        warmup: updates over which the rate rises linearly from zero.
        kind: ``constant``, ``linear`` or ``cosine``.

    Raises:
        ValueError: if ``kind`` is none of these.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return max(0.0, 1.0 - progress)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return 1.0
