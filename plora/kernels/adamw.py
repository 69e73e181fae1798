"""The optimizer's step over many adapters on the CUDA kernels of ``csrc/adamw.cuh``: three launches, no wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plora.kernels.dispatch import kernels
from plora.kernels.schedule import upload

CHUNK = 8192  # elements of a thread block's work; mirrored by adamw.h, as is the record below
BLOCK = 256  # elements that share a scale of their 8-bit moments

_RECORD = np.dtype(
    [
        ("start", "<i8"), ("a_numel", "<i8"), ("numel", "<i8"),
        ("exp_avg", "<u8"), ("exp_avg_sq", "<u8"), ("scales", "<u8"),
        ("beta1", "<f8"), ("beta2", "<f8"),
        ("lr_a", "<f4"), ("lr_b", "<f4"), ("eps", "<f4"), ("weight_decay", "<f4"), ("max_norm", "<f4"),
        ("slot", "<i4"), ("first_chunk", "<i4"), ("unused", "<i4"),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Update:
    """One adapter's step.

    Args:
        slot: its place in the tables ``[K]``.
        start: where its A begins in the arena; B follows.
        a_numel: elements of A, a multiple of 64, as is ``numel``.
        numel: elements of both.
        lr_a, lr_b: learning rates.
        betas, eps, weight_decay: as AdamW's.
        max_norm: threshold of the gradient's norm, infinite for none.
        exp_avg, exp_avg_sq: the moments ``[numel]``, fp32, or uint8 codes.
        scales: of the codes: fp32 ``[2, blocks]``; None where the moments are fp32.
    """

    slot: int
    start: int
    a_numel: int
    numel: int
    lr_a: float
    lr_b: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_norm: float
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scales: Tensor | None


def n_blocks(a_numel: int, numel: int) -> int:
    """Scales of an adapter's 8-bit moment: A and B are cut into blocks each by itself."""
    return -(-a_numel // BLOCK) - (a_numel - numel) // BLOCK


def update(
    weight: Tensor,
    grad: Tensor,
    shadow: Tensor | None,
    updates: Sequence[Update],
    losses: Tensor,
    steps: Tensor,
    codebook: Tensor | None,
) -> Tensor:
    """Clip, AdamW and shadow for all of ``updates``; what is not finite is skipped.

    Args:
        weight, grad: fp32 ``[numel]``, the arena's.
        shadow: bf16 ``[numel]``; None where there is none.
        updates: the adapters that step, at least one.
        losses: fp32 ``[K]``.
        steps: fp32 ``[K]``, updates done so far; counted up where one is done.
        codebook: fp32 ``[2, 256]``, the values of both moments' codes; None where the moments are fp32.

    Returns:
        fp32 ``[2, K]``: norms before clipping and skip flags, zero for other adapters.
    """
    assert (CHUNK, _RECORD.itemsize) == (kernels().ADAMW_CHUNK, kernels().ADAMW_RECORD_BYTES)
    records, n_chunks = pack_records(updates)
    outcome = losses.new_zeros(2, len(losses))
    kernels().adamw(
        weight, grad, shadow, upload(records, weight.device), n_chunks, losses, steps, outcome,
        weight.new_empty(n_chunks), weight.new_empty(len(updates), 4), codebook,
    )  # fmt: skip
    return outcome


def pack_records(updates: Sequence[Update]) -> tuple[Tensor, int]:
    """The records of ``updates`` as bytes ``[n, record]`` on the host, and their chunks in all."""
    records = np.zeros(len(updates), _RECORD)
    n_chunks = 0
    for record, each in zip(records, updates, strict=True):
        assert each.start % 64 == each.a_numel % 64 == each.numel % 64 == 0, "as the arena aligns"
        for name in ("slot", "start", "a_numel", "numel", "lr_a", "lr_b", "eps", "weight_decay", "max_norm"):
            record[name] = getattr(each, name)
        record["beta1"], record["beta2"] = each.betas
        for name in ("exp_avg", "exp_avg_sq", "scales"):
            tensor = getattr(each, name)
            record[name] = 0 if tensor is None else tensor.data_ptr()
        record["first_chunk"] = n_chunks
        n_chunks += -(-each.a_numel // CHUNK) - (each.a_numel - each.numel) // CHUNK
    return torch.from_numpy(records.view(np.uint8).reshape(len(updates), -1)), n_chunks
