"""Causal attention over a packed run of sequences, without a mask over the run and without expanding K and V.

Shapes: ``T`` packed tokens, ``S`` sequences, ``H`` query heads, ``G`` key and value heads, ``E`` head features.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

_MAX_LEN_STEP = 128


def _varlen_options() -> dict[str, Any]:
    """Keywords that make `varlen_attn` causal with fewer key heads, in this torch version's words."""
    if varlen_attn is None:
        return {}
    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    if "enable_gqa" in names:
        options["enable_gqa"] = True
    return options


_VARLEN_OPTIONS = _varlen_options()
_VARLEN_SCALES = varlen_attn is not None and "scale" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True, eq=False)
class PackedSequences:
    """Where the sequences of a packed run begin and end.

    Compiled code reads ``cu_seqlens`` and ``max_len`` alone; ``lengths`` would be a new guard for every batch.

    Args:
        cu_seqlens: int32 ``[S + 1]`` on the model's device: starts of the sequences, then ``T``.
        max_len: the longest length rounded up to a multiple of 128, so that compiled code sees few values.
        lengths: tokens of each sequence, on the host.
    """

    cu_seqlens: torch.Tensor
    max_len: int
    lengths: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedSequences:
        """Describes sequences of the given lengths in tokens, lying one after another; zero is allowed.

        Raises:
            ValueError: if there is no sequence or a length is negative.
        """
        if not lengths or min(lengths) < 0:
            raise ValueError(f"sequence lengths must be zero or more and there must be one, got {list(lengths)}")
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        starts[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        max_len = max(1, -(-max(lengths) // _MAX_LEN_STEP)) * _MAX_LEN_STEP
        return cls(starts.to(device, non_blocking=True), max_len, tuple(int(n) for n in lengths))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def positions(self) -> torch.Tensor:
        """int64 ``[T]``: the place of each token within its sequence."""
        starts = self.cu_seqlens.to(torch.int64)
        lengths = torch.tensor(self.lengths, device=starts.device)
        return torch.arange(sum(self.lengths), device=starts.device) - starts[:-1].repeat_interleave(lengths)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_len: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax(scale Q K^T) V within each sequence, causally.

    Args:
        query: ``[T, H, E]``.
        key: ``[T, G, E]`` with ``G`` dividing ``H``.
        value: ``[T, G, E]``.
        cu_seqlens: int32 ``[S + 1]``.
        max_len: at least the longest sequence.
        scale: factor on the scores, 1 / sqrt(E) where None.

    Returns:
        ``[T, H, E]``.
    """
    default = 1.0 / math.sqrt(query.shape[-1])
    scale = default if scale is None else scale
    if query.device.type == "cpu":
        return _attention_cpu(query, key, value, cu_seqlens, scale)[0]
    if not _flash_takes(query):
        return _attention_by_length(query, key, value, cu_seqlens, scale)
    options = dict(_VARLEN_OPTIONS)
    if _VARLEN_SCALES:
        options["scale"] = scale
    elif scale != default:
        query = query * (scale / default)
    out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_len, max_len, **options)
    assert isinstance(out, torch.Tensor)
    return out


def _flash_takes(query: torch.Tensor) -> bool:
    """Flash attention 2 wants half precision and heads of at most 256 features, a multiple of 8."""
    features = query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    return varlen_attn is not None and half and features <= 256 and features % 8 == 0


def _batches(cu_seqlens: torch.Tensor) -> Iterator[tuple[slice | torch.Tensor, int]]:
    """Groups sequences of equal length: the rows of each group, and that length."""
    bounds = cu_seqlens.tolist()
    starts: dict[int, list[int]] = {}
    for begin, end in pairwise(bounds):
        if end > begin:
            starts.setdefault(end - begin, []).append(begin)
    for length, begins in starts.items():
        if begins[-1] - begins[0] == length * (len(begins) - 1):
            yield slice(begins[0], begins[-1] + length), length
        else:
            rows = torch.tensor(begins)[:, None] + torch.arange(length)
            yield rows.flatten().to(cu_seqlens.device), length


def _heads_first(x: torch.Tensor, rows: slice | torch.Tensor, length: int) -> torch.Tensor:
    """``[T, H, E]`` to ``[batch, H, length, E]``."""
    return x[rows].unflatten(0, (-1, length)).transpose(1, 2)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """bf16 as fp32: on a CPU torch's attention backward is ten times slower in bf16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@torch.compiler.disable
def _attention_by_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """The slow way for what flash attention does not take on an accelerator: fp32 and odd head widths."""
    out = torch.zeros_like(query)
    for rows, length in _batches(cu_seqlens):
        q, k, v = (_heads_first(x, rows, length) for x in (query, key, value))
        part = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        index = torch.arange(len(query), device=query.device)[rows]
        out = out.index_copy(0, index, part.transpose(1, 2).flatten(0, 1))
    return out


# Opaque to the compiler, because it loops over lengths that only the host knows.
@torch.library.custom_op("plora::attention_cpu", mutates_args=(), device_types="cpu")
def _attention_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``[T, H, E]`` and the log of the softmax's denominators ``[T, H]``, which backward needs."""
    out, log_sum = _attention_cpu_fake(query, key, value, cu_seqlens, scale)
    for rows, length in _batches(cu_seqlens):
        q, k, v = (_heads_first(_wide(x), rows, length) for x in (query, key, value))
        part, part_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        out[rows] = part.transpose(1, 2).flatten(0, 1).to(out.dtype)
        log_sum[rows] = part_sum.transpose(1, 2).flatten(0, 1)
    return out, log_sum


@_attention_cpu.register_fake
def _attention_cpu_fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=wide)


@torch.library.custom_op("plora::attention_cpu_backward", mutates_args=(), device_types="cpu")
def _attention_cpu_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    for rows, length in _batches(cu_seqlens):
        g, q, k, v, o = (_heads_first(_wide(x), rows, length) for x in (grad, query, key, value, out))
        sums = log_sum[rows].unflatten(0, (-1, length)).transpose(1, 2)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, o, sums, 0.0, True, scale=scale
        )
        for full, part in zip(grads, parts, strict=True):
            full[rows] = part.transpose(1, 2).flatten(0, 1).to(full.dtype)
    return grads


@_attention_cpu_backward.register_fake
def _attention_cpu_backward_fake(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, cu_seqlens, scale = inputs
    ctx.save_for_backward(query, key, value, *output, cu_seqlens)
    ctx.scale = scale


def _backward(ctx: Any, grad: torch.Tensor, grad_log_sum: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # The log-sums are not part of the result, so no gradient flows into them.
    return (*_attention_cpu_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


_attention_cpu.register_autograd(_backward, setup_context=_save_for_backward)
