"""What one LoRA adapter is: the settings that shape its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ALL_LINEAR = "all-linear"
MAX_RANK = 256
# Ranks that the kernels compute at a time, a fragment of the matrix units: rank 4 takes as long as rank 16.
_RANK_STEP = 16


def computed_rank(rank: int) -> int:
    """The rank that an adapter is computed at: columns of the hidden matrices, and what it costs as much as."""
    return -(-rank // _RANK_STEP) * _RANK_STEP


@dataclass(frozen=True)
class AdapterConfig:
    """Settings of one LoRA adapter: ``y = W x + scale * B A dropout(x)``.

    Args:
        rank: columns of B and rows of A, 1 to 256.
        alpha: numerator of the scale.
        dropout: probability in [0, 1) that an input feature of the adapter is zeroed.
        target_modules: ``"all-linear"`` (every linear layer but the output head) or the last
            path components to adapt, in Hugging Face's names (``("q_proj", "v_proj")``).
        rslora: scale by alpha / sqrt(rank) (arXiv 2312.03732) instead of alpha / rank.
        seed: seeds the initialisation of A and the dropout masks.

    Raises:
        ValueError: if a setting is outside its range; the message names it and its value.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank must be a whole number from 1 to {MAX_RANK}, got {self.rank!r}")
        if not (_is_number(self.alpha) and math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be a positive number, got {self.alpha!r}")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout must be a number in [0, 1), got {self.dropout!r}")
        if not isinstance(self.rslora, bool):
            raise ValueError(f"rslora must be True or False, got {self.rslora!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")
        if isinstance(self.target_modules, str):
            if self.target_modules != ALL_LINEAR:
                raise ValueError(
                    f"target_modules must be {ALL_LINEAR!r} or a list of layer names such as "
                    f"['q_proj', 'v_proj'], got {self.target_modules!r}"
                )
        elif not self.target_modules:
            raise ValueError(f"target_modules is empty: name at least one layer, or use {ALL_LINEAR!r}")
        elif not isinstance(self.target_modules, Iterable) or not all(isinstance(x, str) for x in self.target_modules):
            raise ValueError(f"target_modules must be {ALL_LINEAR!r} or names of layers, got {self.target_modules!r}")

    @property
    def scale(self) -> float:
        """The factor on ``B A x``: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
