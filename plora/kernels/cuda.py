"""The packed LoRA products on the CUDA kernels of ``csrc/``; see ``reference`` for what they compute.

bf16 only, accumulated in fp32. Shapes as in ``reference``; R is a multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from plora.kernels import schedule
from plora.kernels.dispatch import extension

_MIRRORED = (
    "TILE_ROWS", "TILE_RANKS", "RUN_RANKS", "WALK_ROWS", "WALK_RANKS", "SCRATCH_BLOCK", "MAX_SPLITS", "CLUSTER",
    "PIECE_WORDS",
)  # fmt: skip


@dataclass(frozen=True)
class _Work:
    """``DeviceTables`` and the module's offsets, as they cross the operator boundary."""

    counts: Tensor  # int64 [5] on the host: tiles, runs, walks, the workspace blocks of tiles and of the others
    tiles: Tensor
    runs: Tensor
    walks: Tensor
    partials: Tensor
    sums: Tensor
    counters: Tensor
    offsets: Tensor


def lora_add(
    x: Tensor, y: Tensor, weight: Tensor, device: list[Tensor], token_index: Tensor, max_rank: int
) -> tuple[Tensor, Tensor]:
    """See ``reference.lora_add``; ``device`` is ``[*DeviceTables.as_list(), offsets on the device]``."""
    work, hidden, out = _Work(*device), x.new_empty(x.shape[0], max_rank), torch.empty_like(y)
    down(x, weight, hidden, work, token_index)
    up(y, hidden, weight, out, work, token_index)
    return out, hidden


def lora_add_backward(
    dy: Tensor,
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    grad: Tensor,
    device: list[Tensor],
    token_index: Tensor,
    need_dx: bool,
) -> Tensor:
    """See ``reference.lora_add_backward``."""
    work, dhidden = _Work(*device), torch.empty_like(hidden)
    if torch.are_deterministic_algorithms_enabled():
        down(dy, weight, dhidden, work, token_index, backward=True)
        grad_factor(dy, hidden, grad, work, token_index, backward=True)
    else:
        grad_hidden_and_up(dy, hidden, weight, dhidden, grad, work, token_index)
    grad_factor(x, dhidden, grad, work, token_index)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    if need_dx:
        up(None, dhidden, weight, dx, work, token_index, backward=True)
    return dx


def down(
    x: Tensor, weight: Tensor, hidden: Tensor, work: _Work, token_index: Tensor, backward: bool = False, steps: int = 0
) -> None:
    """``hidden = dropout(x) A^T``, or in backward ``hidden = scale x B^T`` for x = dy."""
    _kernels().down(
        x, weight, hidden, work.tiles, int(work.counts[0]), work.offsets, backward, token_index, work.partials,
        work.counters, int(work.counts[3]), not backward, backward, steps,
    )  # fmt: skip


def up(
    y: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    out: Tensor,
    work: _Work,
    token_index: Tensor,
    backward: bool = False,
    steps: int = 0,
) -> None:
    """``out = y + scale hidden B^T``, in backward ``y + mask * (hidden A)`` for hidden = dh; ``y`` may be ``out``."""
    _kernels().up(
        y, hidden, weight, out, work.tiles, int(work.counts[0]), work.offsets, not backward, token_index, backward,
        not backward, steps,
    )  # fmt: skip


def grad_hidden_and_up(
    dy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    dhidden: Tensor,
    grad: Tensor,
    work: _Work,
    token_index: Tensor,
    clusters: bool | None = None,
    clusters_per_run: int = 0,
) -> None:
    """``dhidden = scale dy B`` and ``dB += scale dy^T hidden`` in one pass over dy.

    ``clusters``: the form for compute capability 9.0 and later, or the one for all. Default: what the device has.
    ``clusters_per_run``: how many of them share the columns. Default: as many as fill the device.
    """
    kernels = _kernels()
    clusters = kernels.has_clusters() if clusters is None else clusters
    pieces, count = (work.walks, work.counts[2]) if clusters else (work.runs, work.counts[1])
    kernels.grad_hidden(
        dy, hidden, weight, dhidden, grad, pieces, int(count), work.offsets, True, token_index, work.sums,
        work.counters, int(work.counts[4]), clusters, clusters_per_run,
    )  # fmt: skip


def grad_factor(
    x: Tensor, hidden: Tensor, grad: Tensor, work: _Work, token_index: Tensor, backward: bool = False
) -> None:
    """``dA += hidden^T dropout(x)`` for hidden = dh, or with ``backward`` ``dB += scale hidden^T x`` for x = dy."""
    _kernels().grad_factor(
        x, hidden, grad, work.runs, int(work.counts[1]), work.offsets, backward, token_index, not backward, backward
    )


def _kernels() -> ModuleType:
    kernels = extension()
    assert kernels is not None
    for name in _MIRRORED:
        assert getattr(kernels, name) == getattr(schedule, name), name
    return kernels
