"""The passes that ride on SwiGLU against float64, relative to plain bf16 torch's own error."""

from __future__ import annotations

import pytest
import torch

from plora.kernels import cuda_swiglu
from plora.kernels.dispatch import extension
from tests.kernels.problem import GAP, STANDARD_MIX, ragged
from tests.kernels.swiglu_problem import FORMS, Results, SwigluProblem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or extension() is None, reason="needs a GPU and the kernels"),
]

EVERY_RANK = [1, 3, 7, 8, 16, 17, 32, 33, 64, 65, 96, 127, 128, 129, 160, 200, 256]
RAGGED = [5, 64, 1, 0, 130, 63, 65, 300, 17, 128, 2, 70, 33, 129, 0, 200, 257]
# Of few ranks, which are seen to in one pass.
NARROW = [1, 3, 7, 8, 16, 9, 12, 17, 24, 32, 32, 31]
LONG = [300, 64, 1, 130, 700, 0, 255, 257, 128, 65, 400, 63]

CASES = {
    "every rank, tile widths": {"width": 384, "ranks": EVERY_RANK, "counts": RAGGED, "base_rows": 70},
    "widths of whole vectors": {"width": 200, "ranks": EVERY_RANK, "counts": RAGGED},
    "even widths": {"width": 98, "ranks": EVERY_RANK, "counts": RAGGED},
    "odd widths": {"width": 71, "ranks": EVERY_RANK, "counts": RAGGED, "base_rows": 3},
    "width 5": {"width": 5, "ranks": [4, 16, 40], "counts": [70, 9, 5]},
    "narrow and long": {"width": 1344, "ranks": NARROW, "counts": LONG, "base_rows": 65},
    "narrow and long, odd": {"width": 1343, "ranks": NARROW, "counts": LONG},
    "base alone": {"width": 192, "ranks": [8], "counts": [0], "base_rows": 100},
    "one token each": {"width": 512, "ranks": [16] * 40, "counts": [1] * 40},
    "some missing": {"width": 200, "ranks": [8, 200, 16, 4, 256, 33, 64, 16, 32, 5, 20],
                     "counts": [70, 80, 90, 3, 150, 64, 300, 100, 65, 66, 67], "base_rows": 150,
                     "missing": frozenset({(0, 0), (0, 1), (0, 2), (1, 0), (2, 1), (3, 2), (4, 0), (4, 2), (5, 1),
                                           (5, 2), (6, 0), (6, 1), (6, 2), (7, 0), (7, 1), (8, 0), (8, 2), (9, 1),
                                           (9, 2)})},
    "256 adapters": {"width": 128, "ranks": [1 + i for i in range(256)], "counts": ragged(3000, 256)},
    "standard mix": {"width": 18944, "ranks": STANDARD_MIX, "counts": ragged(1024, 32)},
}  # fmt: skip
WITH_DROPOUT = {
    "dropout": {"width": 320, "ranks": EVERY_RANK, "counts": RAGGED, "dropout": ([0.0, 0.1, 0.5] * 6)[:17]},
    "dropout, odd width": {"width": 331, "ranks": EVERY_RANK, "counts": RAGGED, "dropout": [0.2] * 17},
}


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def check(problem: SwigluProblem, got: Results) -> None:
    truth, plain = problem.reference(torch.float64), problem.reference(torch.bfloat16)
    slots = len(problem.ranks)
    for slot in range(slots + 1):
        own = problem.rows_of(slot)
        if own.start == own.stop:
            continue
        name = f"slot {slot} of {slots}, {own.stop - own.start} rows"
        for part in ("act", "dgate", "dup"):
            assert_close_as_bf16(*(getattr(r, part)[own] for r in (got, plain, truth)), f"{part} of {name}")
        if slot < slots:
            check_adapter(problem, slot, own, got, plain, truth, f"{name}, rank {problem.ranks[slot]}")
    outside = problem.weight.isnan()
    assert torch.equal(got.grad[outside], problem.grad[outside])
    assert outside[:GAP].all()
    assert not problem.work.sums.any()
    assert not problem.work.counters.any()


def check_adapter(
    problem: SwigluProblem, slot: int, own: slice, got: Results, plain: Results, truth: Results, name: str
) -> None:
    """What is small: the hidden matrices and the factors' gradients."""
    rank, columns = problem.ranks[slot], problem.columns
    for member in range(3):
        if (slot, member) in problem.missing:
            continue
        first = member * columns if member < 2 else 0
        hidden = [(r.dhidden if member < 2 else r.hidden_down)[own, first:] for r in (got, plain, truth)]
        assert_close_as_bf16(*(h[:, :rank] for h in hidden), f"hidden {member} of {name}")
        assert not hidden[0][:, rank : -(-rank // 16) * 16].any()
        span = problem.span(slot, member)
        added = got.grad[span] - problem.grad[span]
        # The sum onto the gradient rounds too.
        slack = 2e-7 * (problem.grad[span].norm() / truth.grad[span].norm()).item()
        mine, theirs = error(added, truth.grad[span]), error(plain.grad[span], truth.grad[span])
        assert mine <= 2 * theirs + slack + 1e-6, f"gradient {member} of {name}: {mine:.2e}, plain torch's {theirs:.2e}"


def assert_close_as_bf16(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str) -> None:
    mine, theirs = error(got, truth), error(plain, truth)
    assert mine <= 2 * theirs + 1e-6, f"{what}: error {mine:.2e}, plain torch's {theirs:.2e}"


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, form, replaces):
    problem = SwigluProblem(**CASES[case], replaces=replaces)
    check(problem, problem.cuda(form))


@pytest.mark.parametrize("case", WITH_DROPOUT)
def test_dropout_against_float64(case):
    problem = SwigluProblem(**WITH_DROPOUT[case])
    check(problem, problem.cuda("composed"))


def test_no_rows():
    assert SwigluProblem(width=64, ranks=[8], counts=[0]).cuda().act.shape == (0, 64)


@pytest.mark.parametrize("gate", [-1e3, -1e30, 1e3, 1e30])
def test_saturated_gates_stay_finite(gate):
    problem = SwigluProblem(width=128, ranks=[8, 40], counts=[70, 65], base_rows=10)
    problem.gate.fill_(gate)
    problem.dact.mul_(1e-3)
    got = problem.cuda()
    for part in (got.act, got.dgate, got.dup):
        assert torch.isfinite(part).all()
    if gate < 0:
        assert not got.act.any()


def test_values_of_one_adapter_change_no_bit_of_another():
    problem = SwigluProblem(width=256, ranks=[8, 24, 200], counts=[70, 65, 90])
    before = problem.cuda()
    problem.gate[70:135] = float("nan")
    problem.dact[70:135] = float("inf")
    after = problem.cuda()
    for rows in (slice(0, 70), slice(135, None)):
        for part in ("act", "dgate", "dup"):
            assert torch.equal(getattr(before, part)[rows], getattr(after, part)[rows])
    for slot in (0, 2):
        for member in range(3):
            span = problem.span(slot, member)
            assert torch.equal(before.grad[span], after.grad[span])


def test_deterministic_mode_repeats_to_the_bit():
    torch.use_deterministic_algorithms(True)
    try:
        problem = SwigluProblem(width=1024, ranks=STANDARD_MIX, counts=[2000, *ragged(2000, 31)])
        offsets, down = problem.device_offsets[:2], problem.device_offsets[2:]
        inputs = (problem.gate, problem.up, problem.hidden, problem.weight)
        runs = []
        for _ in range(2):
            grad = problem.grad.clone()
            forward = cuda_swiglu.lora_swiglu(
                *inputs, problem.work, offsets, down, problem.token_index, problem.columns, has_dropout=False
            )
            backward = cuda_swiglu.lora_swiglu_backward(
                problem.dact, problem.dhidden_down, *inputs, grad, problem.work, offsets, down, problem.token_index,
                has_dropout=False,
            )  # fmt: skip
            runs.append(Results(*forward, *backward, grad))
    finally:
        torch.use_deterministic_algorithms(False)
    check(problem, runs[0])
    assert torch.equal(runs[0].act, runs[1].act)
    assert torch.equal(runs[0].grad, runs[1].grad)


def test_bad_arguments_are_named():
    problem = SwigluProblem(width=64, ranks=[8], counts=[9])
    offsets, down = problem.device_offsets[:2], problem.device_offsets[2:]

    def run(**changed: torch.Tensor) -> None:
        given = {"gate": problem.gate, "up": problem.up, "hidden": problem.hidden, "down": down} | changed
        cuda_swiglu.swiglu(
            given["gate"], given["up"], given["hidden"], problem.weight, problem.gate.clone(), None, problem.work,
            offsets, given["down"],
        )  # fmt: skip

    for changed, message in (
        ({"gate": problem.gate.float()}, "gate must be BFloat16"),
        ({"up": problem.up[:4]}, "up must have shape"),
        ({"hidden": problem.hidden[:4]}, "hidden must have 9 rows"),
        ({"hidden": problem.hidden[:, :16]}, "hidden must have a multiple of 32 columns"),
        ({"down": offsets}, "down_offsets must have shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(**changed)
