"""The CUDA kernels against float64, relative to plain bf16 torch's own error."""

from __future__ import annotations

import copy

import pytest
import torch

from plora.kernels import cuda
from plora.kernels.dispatch import backend, extension
from plora.kernels.dropout import combine, keep_mask
from tests.kernels.problem import FORMS, GAP, INPUT_KEY, STANDARD_MIX, Problem, Results, ragged

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or extension() is None, reason="needs a GPU and the kernels"),
]

EVERY_RANK = [1, 3, 7, 8, 16, 17, 32, 33, 64, 65, 96, 127, 128, 129, 160, 255, 256]
RAGGED = [5, 64, 1, 0, 130, 63, 65, 300, 17, 128, 2, 70, 33, 129, 0, 200, 257]
SOME_DROPOUT = [0.0, 0.1, 0.5] * 6

CASES = {
    "every rank, tile widths": {"d": 256, "n": 384, "ranks": EVERY_RANK, "counts": RAGGED},
    "widths of whole vectors": {"d": 72, "n": 200, "ranks": EVERY_RANK, "counts": RAGGED},
    "even widths": {"d": 100, "n": 36, "ranks": EVERY_RANK, "counts": RAGGED},
    "odd widths": {"d": 65, "n": 71, "ranks": EVERY_RANK, "counts": RAGGED},
    "width 1": {"d": 1, "n": 1, "ranks": [4, 16], "counts": [70, 9]},
    "dropout": {"d": 320, "n": 128, "ranks": EVERY_RANK, "counts": RAGGED, "dropout": SOME_DROPOUT[:17]},
    "dropout, odd width": {"d": 331, "n": 131, "ranks": EVERY_RANK, "counts": RAGGED, "dropout": SOME_DROPOUT[:17]},
    "absent and base": {"d": 128, "n": 256, "ranks": [8, 200, 16, 4], "counts": [70, 80, 90, 3], "base_rows": 150,
                        "absent": frozenset({1, 3})},
    "base alone": {"d": 64, "n": 64, "ranks": [8], "counts": [0], "base_rows": 100},
    "one token each": {"d": 512, "n": 512, "ranks": [16] * 40, "counts": [1] * 40},
    "256 adapters": {"d": 128, "n": 192, "ranks": [1 + i for i in range(256)], "counts": ragged(3000, 256)},
    "skewed": {"d": 1024, "n": 896, "ranks": [16] * 32, "counts": [3891, *[6] * 17, *[7] * 14]},
    "standard mix": {"d": 3584, "n": 3584, "ranks": STANDARD_MIX, "counts": ragged(2048, 32), "dropout": [0.05] * 32},
    "group of two": {"d": 192, "n": [128, 320], "ranks": EVERY_RANK, "counts": RAGGED, "base_rows": 70},
    "group of three": {"d": 256, "n": [384, 128, 64], "ranks": EVERY_RANK, "counts": RAGGED},
    "group with dropout, odd widths": {"d": 331, "n": [131, 65, 72], "ranks": EVERY_RANK, "counts": RAGGED,
                                       "dropout": SOME_DROPOUT[:17]},
    "group, some members absent": {"d": 200, "n": [128, 71, 40], "ranks": [8, 200, 16, 4, 256, 33, 64],
                                   "counts": [70, 80, 90, 3, 150, 64, 600], "base_rows": 150, "absent": frozenset({3}),
                                   "missing": frozenset({(0, 0), (0, 2), (1, 1), (2, 2), (4, 0), (5, 0), (5, 1),
                                                         (6, 1)})},
    "group of 256 adapters": {"d": 128, "n": [64, 64, 192], "ranks": [1 + i for i in range(256)],
                              "counts": ragged(3000, 256)},
    "q, k and v": {"d": 3584, "n": [3584, 512, 512], "ranks": STANDARD_MIX, "counts": ragged(2048, 32),
                   "dropout": [0.05] * 32},
    "gate and up": {"d": 3584, "n": [2368, 2368], "ranks": STANDARD_MIX, "counts": ragged(2048, 32)},
    "wide in": {"d": 18944, "n": 3584, "ranks": STANDARD_MIX, "counts": ragged(1024, 32)},
    "wide out": {"d": 3584, "n": 18944, "ranks": STANDARD_MIX, "counts": ragged(1024, 32)},
}  # fmt: skip


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_close_as_bf16(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str) -> None:
    mine, theirs = error(got, truth), error(plain, truth)
    assert mine <= 2 * theirs + 1e-6, f"{what}: error {mine:.2e}, plain torch's {theirs:.2e}"


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, form, replaces):
    problem = Problem(**CASES[case], replaces=replaces)
    truth, plain, got = problem.reference(torch.float64), problem.reference(torch.bfloat16), problem.cuda(form)
    rows, base = problem.tables.rows.tolist(), int(problem.tables.rows[-2])
    for slot in range(len(problem.ranks)):
        own = slice(rows[slot], rows[slot + 1])
        if own.start == own.stop:
            continue
        members = [m for m in range(problem.members) if not problem.lacks(slot, m)]
        for member in range(problem.members):
            if member in members:
                assert_member(problem, slot, member, truth, plain, got)
            else:
                assert torch.equal(got.outs[member][own], problem.ys[member][own])
                assert problem.of_member(got.hidden, member)[own].isnan().all()
        if members:
            assert_close_as_bf16(got.dx[own], plain.dx[own], truth.dx[own], f"dx of slot {slot}")
        else:
            assert not got.dx[own].any()
    for out, right, y in zip(got.outs, truth.outs, problem.ys, strict=True):
        assert out.shape == right.shape
        assert torch.equal(out[base:], y[base:])
    assert not got.dx[base:].any()
    assert_nothing_else_written(problem, got.grad)


def assert_member(problem: Problem, slot: int, member: int, truth: Results, plain: Results, got: Results) -> None:
    """Everything of one adapter in one member but dx."""
    rank, k = problem.ranks[slot], len(problem.ranks)
    own = slice(int(problem.tables.rows[slot]), int(problem.tables.rows[slot + 1]))
    name = f"slot {slot}, member {member}, rank {rank}, {own.stop - own.start} rows"
    mine, theirs, right = (problem.of_member(each.hidden, member)[own] for each in (got, plain, truth))
    assert_close_as_bf16(mine[:, :rank], theirs[:, :rank], right[:, :rank], f"hidden of {name}")
    assert not mine[:, rank : -(-rank // 16) * 16].any()
    mine, theirs, right = (each.outs[member][own] for each in (got, plain, truth))
    assert_close_as_bf16(mine, theirs, right, f"out of {name}")
    for begin, width, factor in ((slot, problem.d, "A"), (k + slot, problem.widths[member], "B")):
        start = int(problem.offsets[member, begin])
        span = slice(start, start + rank * width)
        added = got.grad[span] - problem.grad[span]
        # The sum onto the gradient rounds too.
        slack = 2e-7 * (problem.grad[span].norm() / truth.grad[span].norm()).item()
        assert error(added, truth.grad[span]) <= 2 * error(plain.grad[span], truth.grad[span]) + slack + 1e-6, (
            f"grad of {factor} of {name}"
        )


def assert_nothing_else_written(problem: Problem, grad: torch.Tensor) -> None:
    outside = problem.weight.isnan()
    assert torch.equal(grad[outside], problem.grad[outside])
    assert outside[:GAP].all()
    assert not problem.work.sums.any()
    assert not problem.work.counters.any()


def test_no_rows():
    result = Problem(d=64, n=64, ranks=[8], counts=[0]).cuda()
    assert result.outs[0].shape == (0, 64)


@pytest.mark.parametrize("width", [256, 250, 255])
def test_mask_is_the_references_bit_for_bit(width):
    problem = Problem(d=width, n=64, ranks=[width], counts=[333], dropout=[0.3])
    problem.x.fill_(1.0)
    start = int(problem.offsets[0, 0])
    problem.weight[start : start + width * width] = torch.eye(width, device="cuda").flatten().bfloat16()
    key = combine(int(problem.tables.key[0]), INPUT_KEY)
    expected = keep_mask(key, problem.token_index, width, int(problem.tables.limit[0]))
    hidden = problem.cuda().hidden[:, :width]
    assert torch.equal(hidden != 0, expected)
    torch.testing.assert_close(hidden[expected].float().mean().item(), 1 / 0.7, rtol=4e-3, atol=0)


@pytest.mark.parametrize("form", ["one pass", "apart"])
@pytest.mark.parametrize("n", [[320], [320, 64, 64]])
def test_values_of_one_adapter_change_no_bit_of_another(form, n):
    problem = Problem(d=256, n=n, ranks=[8, 40, 200], counts=[70, 65, 90], dropout=[0.2] * 3)
    before = problem.cuda(form)
    problem.x[70:135] = float("nan")
    for dy in problem.dys:
        dy[70:135] = float("inf")
    after = problem.cuda(form)
    for first, second in zip([*before.outs, before.dx], [*after.outs, after.dx], strict=True):
        for rows in (slice(0, 70), slice(135, None)):
            assert torch.equal(first[rows], second[rows])
    for slot, rank in ((0, 8), (2, 200)):
        for member, width in enumerate(n):
            for begin, wide in ((slot, 256), (3 + slot, width)):
                start = int(problem.offsets[member, begin])
                span = slice(start, start + rank * wide)
                assert torch.equal(before.grad[span], after.grad[span])


@pytest.mark.parametrize("n", [[896], [896, 64, 128]])
def test_deterministic_mode_repeats_to_the_bit(n):
    torch.use_deterministic_algorithms(True)
    try:
        problem = Problem(d=1024, n=n, ranks=STANDARD_MIX, counts=[2000, *ragged(2000, 31)])
        first, second = problem.cuda("apart"), problem.cuda("apart")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first.dx, second.dx)
    assert torch.equal(first.grad, second.grad)
    for one, other in zip(first.outs, second.outs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_composition_is_that_of_the_kernels(deterministic):
    problem = Problem(d=256, n=[320, 64, 71], ranks=[8, 40, 130], counts=[70, 65, 300], base_rows=10)
    expected, grad = problem.cuda("apart"), problem.grad.clone()
    weight, index, places = problem.weight, problem.token_index, problem.device_offsets
    torch.use_deterministic_algorithms(deterministic)
    try:
        hidden = cuda.lora_down(problem.x, weight, problem.work, places, index, problem.columns)
        outs = cuda.lora_up(problem.ys, hidden, weight, problem.work, places, index)
        dhidden = cuda.lora_up_backward(problem.dys, hidden, weight, grad, problem.work, places, index)
        dx = cuda.lora_down_grad_input(dhidden, problem.x.shape[1], weight, problem.work, places, index)
        cuda.grad_factor(problem.x, dhidden, grad, problem.work, places, index)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(outs, expected.outs, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(dx, expected.dx, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grad, expected.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("n", [[320], [320, 64]])
def test_up_adds_in_place(n):
    problem = Problem(d=256, n=n, ranks=[8, 40, 100], counts=[70, 65, 70], base_rows=10)
    expected = problem.cuda()
    for m, (y, out) in enumerate(zip(problem.ys, expected.outs, strict=True)):  # one by one
        y, hidden = y.clone(), problem.of_member(expected.hidden, m)
        cuda.up([y], hidden, problem.weight, [y], problem.work, problem.device_offsets[m], problem.token_index)
        assert torch.equal(y, out)
    dx, before = problem.x.clone(), torch.empty_like(problem.x)
    arguments = (problem.work, problem.device_offsets, problem.token_index)
    cuda.up([dx], expected.hidden, problem.weight, [dx], *arguments, backward=True)
    cuda.up([None], expected.hidden, problem.weight, [before], *arguments, backward=True)
    torch.testing.assert_close(dx, problem.x + before, rtol=1e-2, atol=2e-2)
    assert torch.equal(dx[-10:], problem.x[-10:])


@pytest.mark.parametrize("slots", [0, 1])
@pytest.mark.parametrize(("n", "d"), [(64, 320), (71, 100), (1000, 64)])
def test_up_adds_the_residual(n, d, slots):
    ranks, counts = [8, 20, 64, 65, 130, 200, 5], [70, 65, 1, 64, 300, 10, 40]
    problem = Problem(d=d, n=n, ranks=ranks, counts=counts, base_rows=70, absent=frozenset({6}))
    expected = problem.cuda()
    residual, out = problem.random(problem.rows, n), torch.full_like(problem.ys[0], float("nan"))
    arguments = (problem.weight, [out], problem.work, problem.device_offsets[0], problem.token_index)
    cuda.up(problem.ys, expected.hidden, *arguments, residual=residual, slots=slots)
    exact = problem.reference(torch.float64).outs[0] + residual
    assert error(out, exact) <= 1.2 * error(exact.bfloat16(), exact) + 1e-4
    without = slice(sum(counts[:6]), None)
    assert torch.equal(out[without], problem.ys[0][without] + residual[without])


def test_bad_arguments_are_named():
    problem = Problem(d=64, n=64, ranks=[8], counts=[9])
    hidden = torch.zeros(9, 16, device="cuda", dtype=torch.bfloat16)

    def run(x, hidden=hidden, offsets=problem.device_offsets):
        cuda.down(x, problem.weight, hidden, problem.work, offsets, problem.token_index)

    for x, message in (
        (problem.x.float(), "x must be BFloat16"),
        (problem.x.cpu(), "x must be on a CUDA device"),
        (problem.x.T, "x must be contiguous"),
        (problem.x[0], "x must have 2 dimensions"),
        (problem.x[:4], "hidden must have 4 rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(x)
    wide = torch.zeros(9, 40, device="cuda", dtype=torch.bfloat16)
    for bad, message in (
        (hidden[:, :8], "hidden must have a multiple of 16 columns"),
        (wide[:, 1:17], "hidden must begin on 16 bytes"),
        (wide[:, :32:2], "hidden must have neighbouring columns"),
        (hidden.new_zeros(9, 272), "hidden must have at most 256 columns a member"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(problem.x, bad)
    with pytest.raises(RuntimeError, match="hidden must have at most 256 columns a member, a multiple of 16, got 16"):
        run(problem.x, offsets=problem.device_offsets.repeat(2, 1))
    arguments = (problem.work, problem.device_offsets, problem.token_index)
    for ys, outs, residual, message in (
        (problem.ys, problem.dys, problem.ys[0][:4], "residual must have shape"),
        (problem.ys * 2, problem.dys, None, r"ys must be 1 tensors by offsets of shape \[1, 3\], got 2"),
        (problem.ys * 2, problem.dys * 2, None, r"outs must be 1 tensors by offsets of shape \[1, 3\], got 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cuda.up(ys, hidden, problem.weight, outs, *arguments, residual=residual)
    with pytest.raises(RuntimeError, match="grad_hidden must have strides"):
        cuda.grad_hidden_and_up(problem.dys, hidden, problem.weight, wide[:, :16], problem.grad, *arguments)


def packed_step(model, counts):
    from tests.modules.toy import tokens

    packed = model.get_submodule("plora")
    packed.zero_grad_()
    with packed.route(counts, steps=dict.fromkeys(packed.slots, 5)):
        logits = model(tokens(sum(counts)).cuda())
        values = logits.float()
        (values.sin() * torch.linspace(0.5, 1, values.numel(), device="cuda").view_as(values)).sum().backward()
    return logits.detach(), packed.arena.grad.clone()


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_model_runs_on_the_kernels(compiled, monkeypatch):
    from plora.modules.config import AdapterConfig
    from plora.modules.packed import pack_adapters
    from tests.modules.toy import Toy, randomise

    monkeypatch.setattr(torch._dynamo.config, "accumulated_recompile_limit", 64)
    model = Toy()
    pack_adapters(model, [AdapterConfig(rank=r, dropout=p, seed=r) for r, p in ((4, 0.3), (7, 0), (150, 0.1))])
    randomise(model.plora)
    exact = copy.deepcopy(model).cuda()
    half = model.cuda().bfloat16()
    assert half.plora._shared.device_tables is not None, backend()
    assert exact.plora._shared.device_tables is None
    if compiled:
        half.compile(fullgraph=True, dynamic=True)
    for counts in ([70, 30, 100], [0, 200, 1], [5, 0, 300]):
        truth, true_grad = packed_step(exact, counts)
        got, grad = packed_step(half, counts)
        assert error(got, truth.double()) < 0.03
        assert error(grad, true_grad.double()) < 0.05
