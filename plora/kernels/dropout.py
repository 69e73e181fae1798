"""Counter-based dropout: the mask is a pure function of (key, token, feature).

A trial's mask therefore does not depend on who shares its microbatch, and backward makes it
again instead of storing it. Each 32-bit hash yields two 16-bit draws, for features ``2i`` and
``2i + 1``, so a probability is rounded to a multiple of 1/65536.

Shapes: ``t`` tokens, ``D`` features.
"""

from __future__ import annotations

import torch

RESOLUTION = 1 << 16
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def threshold(p: float) -> int:
    """Draws below this are dropped; 0 means no dropout."""
    return min(round(p * RESOLUTION), RESOLUTION - 1)


def combine(*parts: int) -> int:
    """Mix whole numbers into one signed 64-bit key (SplitMix64's finaliser after each part)."""
    state = 0
    for part in parts:
        state = (state + _GOLDEN + (part & _MASK64)) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return _signed(state, 64)


def keep_mask(key: int, token_index: torch.Tensor, features: int, limit: int) -> torch.Tensor:
    """Which inputs survive.

    Args:
        key: from ``combine(seed, step, input)``.
        token_index: int32 ``[t]``, the token's index within its trial's batch.
        features: D.
        limit: from ``threshold(p)``.

    Returns:
        bool ``[t, D]``.
    """
    pairs = (features + 1) // 2
    # The two halves of the key enter at different points of the hash, so that streams of different
    # keys are not shifted copies of each other.
    first, second = _signed(key & 0xFFFFFFFF, 32), _signed((key >> 32) & 0xFFFFFFFF, 32)
    column = torch.arange(pairs, dtype=torch.int32, device=token_index.device)
    bits = token_index.to(torch.int32)[:, None] * pairs + column
    bits = (bits ^ first) * _signed(0x9E3779B1, 32)
    bits = (bits ^ _shift_right(bits, 16)) * _signed(0x85EBCA6B, 32) + second
    bits = (bits ^ _shift_right(bits, 13)) * _signed(0xC2B2AE35, 32)
    bits = bits ^ _shift_right(bits, 16)
    draws = torch.stack((bits & 0xFFFF, _shift_right(bits, 16)), dim=-1).flatten(1)
    return draws[:, :features] >= limit


def scaled_mask(key: int, token_index: torch.Tensor, features: int, limit: int, dtype: torch.dtype) -> torch.Tensor:
    """``keep_mask`` as factors ``[t, D]``: 0 where dropped, 1 / (1 - p) where kept."""
    return keep_mask(key, token_index, features, limit).to(dtype) * (RESOLUTION / (RESOLUTION - limit))


def _shift_right(bits: torch.Tensor, n: int) -> torch.Tensor:
    """Logical shift of int32, which torch has only as an arithmetic one."""
    return (bits >> n) & ((1 << (32 - n)) - 1)


def _signed(value: int, width: int) -> int:
    return value - (1 << width) if value >= 1 << (width - 1) else value
