"""Packed attention against softmax attention written out."""

from __future__ import annotations

import pytest
import torch

from plora.models.attention import PackedSequences, packed_attention

RAGGED = [
    [5, 17, 1, 130, 5],
    [1],
    [3, 0, 4, 0],
    [7, 7, 7],
    [2, 9, 2, 9, 2],
]


def _inputs(tokens: int, heads: int, kv_heads: int, features: int, **options: object) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(tokens, n, features, **options, requires_grad=True) for n in (heads, kv_heads, kv_heads)]


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float | None
) -> torch.Tensor:
    """Softmax attention in float64, written out."""
    parts, group = [], query.shape[1] // key.shape[1]
    for q, k, v in zip(*(x.double().split(lengths) for x in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhe,khe->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        past = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).tril()
        parts.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(~past, -torch.inf).softmax(-1), v))
    return torch.cat(parts)


def _check(lengths: list[int], device: str, dtype: torch.dtype, tolerance: float, scale: float | None = None) -> None:
    inputs = _inputs(sum(lengths), 6, 2, 16, device=device, dtype=dtype)
    sequences = PackedSequences.from_lengths(lengths, device)
    out = packed_attention(*inputs, sequences.cu_seqlens, sequences.max_len, scale)
    expected = _one_by_one(*inputs, lengths, scale)
    weight = torch.randn(out.shape, device=device)
    pairs = [(out, expected)]
    grads = torch.autograd.grad((out.float() * weight).sum(), inputs)
    pairs += zip(grads, torch.autograd.grad((expected * weight).sum(), inputs), strict=True)
    for ours, theirs in pairs:
        # A sequence of one token has no gradient of query and key: what is left is rounding.
        assert (ours.double() - theirs.double()).norm() <= tolerance * (theirs.double().norm() + 1e-3)


@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_equals_attention_written_out(lengths: list[int], scale: float | None) -> None:
    _check(lengths, "cpu", torch.float32, 1e-6, scale)


def test_in_bf16() -> None:
    _check(RAGGED[0], "cpu", torch.bfloat16, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", RAGGED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_on_a_gpu(lengths: list[int], dtype: torch.dtype, tolerance: float, scale: float | None) -> None:
    _check(lengths, "cuda", dtype, tolerance, scale)


def test_a_sequence_of_nan_changes_no_bit_of_the_others() -> None:
    lengths = [4, 6, 4]
    sequences = PackedSequences.from_lengths(lengths)
    clean = _inputs(14, 6, 2, 16)
    dirty = [x.detach().clone().requires_grad_() for x in clean]
    with torch.no_grad():
        for x in dirty:
            x[4:10] = torch.nan
    others = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    outs = [packed_attention(*x, sequences.cu_seqlens, sequences.max_len) for x in (clean, dirty)]
    assert torch.equal(outs[0][others], outs[1][others])
    grads = [torch.autograd.grad(out.sum(), x) for out, x in zip(outs, (clean, dirty), strict=True)]
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours[others], theirs[others])


def test_registered_ops_are_sound() -> None:
    inputs = _inputs(9, 4, 2, 8)
    sequences = PackedSequences.from_lengths([4, 2, 3])
    torch.library.opcheck(torch.ops.plora.attention_cpu.default, (*inputs, sequences.cu_seqlens, 0.3))


def test_compiled_into_one_graph() -> None:
    inputs = _inputs(9, 4, 2, 8)
    sequences = PackedSequences.from_lengths([4, 5])

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return packed_attention(query * 2, key, value, sequences.cu_seqlens, sequences.max_len) + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    weight = torch.randn(9, 4, 8)
    for ours, theirs in zip(
        torch.autograd.grad((compiled(*inputs) * weight).sum(), inputs),
        torch.autograd.grad((attend(*inputs) * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_packed_sequences() -> None:
    sequences = PackedSequences.from_lengths([3, 0, 130])
    assert sequences.cu_seqlens.tolist() == [0, 3, 3, 133]
    assert sequences.cu_seqlens.dtype == torch.int32
    assert (sequences.max_len, sequences.longest) == (256, 130)
    assert sequences.positions().tolist() == [0, 1, 2, *range(130)]
    assert PackedSequences.from_lengths([128]).max_len == 128


@pytest.mark.parametrize("lengths", [[], [3, -1]])
def test_impossible_lengths(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="zero or more"):
        PackedSequences.from_lengths(lengths)


def test_long_sequences_need_no_quadratic_mask() -> None:
    """16 sequences of 2048: scores over the run would take 6 * (32768 ** 2) * 4 bytes = 24 GiB."""
    query, key, value = (torch.zeros(32768, n, 16) for n in (6, 2, 2))
    sequences = PackedSequences.from_lengths([2048] * 16)
    out = packed_attention(query, key, value + 1, sequences.cu_seqlens, sequences.max_len)
    torch.testing.assert_close(out, torch.ones_like(out))
