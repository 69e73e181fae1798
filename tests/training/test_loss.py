"""Chunked cross-entropy against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from plora.training.loss import (
    _fusable_chunk,
    backward_cross_entropy,
    chunk_rows,
    cross_entropy_rows,
    token_losses,
)

T, D, V, K = 37, 16, 101, 4


@pytest.fixture
def case() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([0, 3, 4, 9, 10, 11, 20, 21, 30, 36])
    slots = torch.tensor([0, 0, 0, 1, 1, 1, 1, 3, 3, 3])
    counts = torch.tensor([5.0, 4.0, 1.0, 9.0])
    return {
        "hidden": torch.randn(T, D, generator=generator, requires_grad=True),
        "head": torch.randn(V, D, generator=generator),
        "rows": rows,
        "labels": torch.randint(V, (len(rows),), generator=generator),
        "slots": slots,
        "weight": 1 / counts[slots],
    }


def _ours(case: dict[str, torch.Tensor], chunk: int, hidden: torch.Tensor | None = None) -> torch.Tensor:
    hidden = case["hidden"] if hidden is None else hidden
    return backward_cross_entropy(
        lambda x: F.linear(x, case["head"]),
        hidden,
        case["rows"],
        case["labels"],
        case["weight"],
        case["slots"],
        K,
        chunk=chunk,
    )


@pytest.mark.parametrize("chunk", [1, 3, 10, 1000])
def test_loss_and_gradient_equal_plain_torch_in_float64(case: dict[str, torch.Tensor], chunk: int) -> None:
    losses = _ours(case, chunk)
    hidden = case["hidden"].detach().double().requires_grad_()
    logits = F.linear(hidden[case["rows"]], case["head"].double())
    each = F.cross_entropy(logits, case["labels"], reduction="none") * case["weight"].double()
    each.sum().backward()
    expected = torch.zeros(K, dtype=torch.float64).index_add(0, case["slots"], each.detach())
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(case["hidden"].grad.double(), hidden.grad, rtol=1e-5, atol=1e-7)
    assert losses[2] == 0


def test_nan_of_one_slot_changes_no_bit_of_the_others(case: dict[str, torch.Tensor]) -> None:
    clean = _ours(case, 4)
    poisoned = case["hidden"].detach().clone()
    poisoned[9:21] = float("nan")  # rows of slot 1
    poisoned.requires_grad_()
    losses = _ours(case, 4, poisoned)
    others = [0, 2, 3]
    assert losses[1].isnan()
    assert torch.equal(losses[others], clean[others])
    rows = case["rows"][case["slots"] != 1]
    assert torch.equal(poisoned.grad[rows], case["hidden"].grad[rows])
    assert poisoned.grad[9].isnan().all()


def test_never_holds_the_logits_of_more_rows_than_a_chunk(case: dict[str, torch.Tensor]) -> None:
    seen = []

    def head(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return F.linear(x, case["head"])

    backward_cross_entropy(
        head, case["hidden"], case["rows"], case["labels"], case["weight"], case["slots"], K, chunk=4
    )
    assert seen == [4, 4, 2]


def test_bf16_is_as_close_to_the_truth_as_plain_torch(case: dict[str, torch.Tensor]) -> None:
    hidden = case["hidden"].detach().bfloat16().requires_grad_()
    head = case["head"].bfloat16()
    args = (case["rows"], case["labels"], case["weight"], case["slots"], K)
    backward_cross_entropy(lambda x: F.linear(x, head), hidden, *args, chunk=4)

    def plain(dtype: torch.dtype) -> torch.Tensor:
        leaf = hidden.detach().to(dtype).requires_grad_()
        logits = F.linear(leaf[case["rows"]], head.to(dtype))
        (
            F.cross_entropy(
                logits.to(max(dtype, torch.float32, key=lambda d: d.itemsize)), case["labels"], reduction="none"
            )
            * case["weight"]
        ).sum().backward()
        return leaf.grad.double()

    truth = plain(torch.float64)
    ours, theirs = (hidden.grad.double() - truth).norm(), (plain(torch.bfloat16) - truth).norm()
    assert ours <= 1.2 * theirs


def test_form_for_the_compiler_equals_the_eager_one(case: dict[str, torch.Tensor]) -> None:
    from plora.training.loss import _eager_chunk

    logits = torch.randn(10, V)
    for ours, theirs in zip(
        _fusable_chunk(logits, case["labels"], case["weight"]),
        _eager_chunk(logits, case["labels"], case["weight"]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_token_losses_are_the_rows_losses(case: dict[str, torch.Tensor]) -> None:
    hidden = case["hidden"].detach()
    ours = token_losses(lambda x: F.linear(x, case["head"]), hidden, case["rows"], case["labels"], chunk=3)
    expected = cross_entropy_rows(F.linear(hidden[case["rows"]], case["head"]), case["labels"])
    torch.testing.assert_close(ours, expected)
    assert not ours.requires_grad


@pytest.mark.parametrize("vocab", [100, 49152, 152064])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_hold_a_bounded_number_of_logits(vocab: int, device: str) -> None:
    rows = chunk_rows(vocab, torch.device(device))
    assert rows % 64 == 0
    assert rows * vocab <= 2**27 + 256 * vocab
    assert rows >= (800 if device == "cuda" else 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_loss_equals_the_eager_one_without_waiting_for_the_device() -> None:
    device = torch.device("cuda")
    n, width, vocab = 700, 64, 5003
    head = torch.randn(vocab, width, device=device, dtype=torch.bfloat16)
    hidden = torch.randn(n, width, device=device, dtype=torch.bfloat16)
    rows = torch.arange(0, n, 2, device=device)
    labels = torch.randint(vocab, (len(rows),), device=device)
    weight, slots = torch.rand(len(rows), device=device), rows // 100
    found = []
    for compiled in (False, True):
        leaf = hidden.clone().requires_grad_()
        args = (lambda x: F.linear(x, head), leaf, rows, labels, weight, slots, 7)
        backward_cross_entropy(*args, chunk=64, compiled=compiled)
        leaf.grad = None
        torch.cuda.set_sync_debug_mode("error")
        losses = backward_cross_entropy(*args, chunk=64, compiled=compiled)
        torch.cuda.set_sync_debug_mode("default")
        found.append((losses, leaf.grad.float()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert (found[0][1] - found[1][1]).norm() <= 1e-3 * found[0][1].norm()
