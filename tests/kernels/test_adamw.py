"""The optimizer's kernels against float64, and against the step in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from plora.kernels import adamw
from plora.kernels.dispatch import extension
from plora.modules.config import AdapterConfig
from plora.modules.packed import PackedAdapters, pack_adapters
from plora.training.moments import EightBitMoments, dequantized, quantized
from plora.training.optimizer import OPTIMIZER_STATES, AdamWConfig, PackedAdamW

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or extension() is None, reason="needs a GPU and the kernels"),
]

# Elements of A and B: a part of a block, whole chunks, one element group more, many chunks.
SIZES = [(64, 64), (128, 8192), (8192 + 64, 320), (64 * 777, 64 * 1001), (1 << 20, (1 << 20) + 64)]
MARGIN = 64  # elements around them, which nothing may touch


class Problem:
    """Adapters of ``SIZES`` with settings of their own; slot 0 has none."""

    def __init__(self, state: str) -> None:
        self.codebook = EightBitMoments().codebook(torch.device("cuda")) if state == "8bit" else None
        numel = sum(a + b for a, b in SIZES) + 2 * MARGIN
        self.weight = torch.empty(numel, device="cuda").uniform_(-0.1, 0.1)
        self.grad = torch.zeros(numel, device="cuda")
        self.shadow = torch.full((numel,), 9.0, dtype=torch.bfloat16, device="cuda")
        self.losses, self.steps = torch.zeros(2, len(SIZES) + 1, device="cuda")
        self.updates, start = [], MARGIN
        for i, (a, b) in enumerate(SIZES):
            kind = torch.float32 if self.codebook is None else torch.uint8
            exp_avg, exp_avg_sq = torch.zeros(2, a + b, dtype=kind, device="cuda")
            scales = None if self.codebook is None else torch.zeros(2, adamw.n_blocks(a, a + b), device="cuda")
            self.updates.append(
                adamw.Update(
                    i + 1, start, a, a + b, 1e-2 / (i + 1), 4e-2 / (i + 1), (0.9, 0.999) if i % 2 else (0.8, 0.99),
                    1e-8 if i % 3 else 1e-6, 0.1 * (i % 2), math.inf if i == 2 else 0.05 * (i + 1),
                    exp_avg, exp_avg_sq, scales,
                )
            )  # fmt: skip
            start += a + b

    def fill(self, step: int) -> None:
        self.grad.normal_(0, 1e-3, generator=torch.Generator("cuda").manual_seed(step))
        self.grad[MARGIN : MARGIN + 64] *= torch.logspace(-8, 1, 64, device="cuda")

    def step(self) -> Tensor:
        return adamw.update(self.weight, self.grad, self.shadow, self.updates, self.losses, self.steps, self.codebook)

    def moments(self, update: adamw.Update) -> list[Tensor]:
        """Copies of what holds an adapter's moments."""
        held = (update.exp_avg, update.exp_avg_sq, update.scales)
        return [each.clone() for each in held if each is not None]

    def parts(self, update: adamw.Update) -> list[tuple[slice, slice, float]]:
        """Elements, blocks and rate of A and of B."""
        a_blocks = adamw.n_blocks(update.a_numel, update.a_numel)
        return [
            (slice(0, update.a_numel), slice(0, a_blocks), update.lr_a),
            (slice(update.a_numel, update.numel), slice(a_blocks, None), update.lr_b),
        ]


def relative(got: Tensor, truth: Tensor) -> float:
    return ((got.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("state", OPTIMIZER_STATES)
def test_against_float64(state: str) -> None:
    problem = Problem(state)
    for t in range(1, 6):
        problem.fill(t)
        weight, grad = problem.weight.double(), problem.grad.double()
        before = [problem.moments(update) for update in problem.updates]
        outcome = problem.step()
        assert not outcome[1].any()
        assert outcome[0, 0] == 0
        for update, held in zip(problem.updates, before, strict=True):
            assert problem.steps[update.slot] == t
            own = grad[update.start : update.start + update.numel]
            assert outcome[0, update.slot].item() == pytest.approx(own.norm().item(), rel=1e-6)
            own = own * min(1.0, update.max_norm / (own.norm().item() + 1e-6))
            for span, blocks, lr in problem.parts(update):
                _check_part(problem, update, held, own[span], weight, span, blocks, lr, t)
        edges = (slice(0, MARGIN), slice(-MARGIN, None))
        assert all(torch.equal(problem.weight[e].double(), weight[e]) for e in edges)
        assert torch.equal(problem.grad.double(), grad)
        assert torch.equal(problem.shadow[MARGIN:-MARGIN], problem.weight[MARGIN:-MARGIN].bfloat16())
        assert (problem.shadow[:MARGIN] == 9).all()


def _check_part(
    problem: Problem,
    update: adamw.Update,
    held: list[Tensor],
    grad: Tensor,
    weight: Tensor,
    span: slice,
    blocks: slice,
    lr: float,
    t: int,
) -> None:
    values, truths = problem.codebook, []
    for i, (beta, addend) in enumerate(zip(update.betas, (grad, grad.square()), strict=True)):
        old = held[i][span] if values is None else dequantized(held[i][span], held[2][i, blocks], values[i])
        truths.append(beta * old.double() + (1 - beta) * addend)
    first, second = (truth / (1 - beta**t) for truth, beta in zip(truths, update.betas, strict=True))
    place = slice(update.start + span.start, update.start + span.stop)
    right = weight[place] * (1 - lr * update.weight_decay) - lr * first / (second.sqrt() + update.eps)
    assert relative(problem.weight[place], right) < 1e-6
    for i, (moment, truth) in enumerate(zip((update.exp_avg, update.exp_avg_sq), truths, strict=True)):
        if values is None or update.scales is None:
            assert relative(moment[span], truth) < 1e-6
            continue
        codes, scales = quantized(truth.float(), values[i])
        torch.testing.assert_close(update.scales[i, blocks], scales, rtol=1e-6, atol=0)
        off = (moment[span].int() - codes.int()).abs()
        # Rounding in the update may move a value over the middle between two codes.
        assert off.max() <= 1
        assert off.count_nonzero() <= 1 + 1e-3 * len(off)


@pytest.mark.parametrize("state", OPTIMIZER_STATES)
def test_what_is_not_finite_is_skipped_bit_for_bit(state: str) -> None:
    problem = Problem(state)
    for t in (1, 2):
        problem.fill(t)
        problem.step()
    problem.fill(3)
    problem.losses[2] = math.nan
    problem.grad[problem.updates[3].start + 7] = math.inf
    weight = problem.weight.clone()
    before = [problem.moments(update) for update in problem.updates]
    outcome = problem.step()
    assert outcome[1].tolist() == [0, 0, 1, 0, 1, 0]
    assert problem.steps.tolist() == [0, 3, 2, 3, 2, 3]
    for update, held in zip(problem.updates, before, strict=True):
        span = slice(update.start, update.start + update.numel)
        is_skipped = update.slot in (2, 4)
        assert torch.equal(problem.weight[span], weight[span]) is is_skipped
        same = [torch.equal(now, old) for now, old in zip(problem.moments(update), held, strict=True)]
        assert all(same) if is_skipped else not any(same)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(320, 200)
        self.down_proj = nn.Linear(200, 320)


@pytest.mark.parametrize("state", OPTIMIZER_STATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_step_equals_the_one_in_torch(state: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(backend: str, state: str = state) -> PackedAdapters:
        monkeypatch.setenv("PLORA_BACKEND", backend)
        torch.manual_seed(0)
        configs = [AdapterConfig(rank=3, seed=1), AdapterConfig(rank=64, seed=2), AdapterConfig(rank=8, seed=3)]
        packed = pack_adapters(Model().to("cuda", dtype), configs)
        optimizer = PackedAdamW(packed, state)
        for slot in range(3):
            optimizer.add(slot, AdamWConfig(weight_decay=0.01 * slot, max_grad_norm=0.5 if slot else None))
        for step in range(10):
            generator = torch.Generator("cuda").manual_seed(step)
            for pair in (
                pair for slot in range(3) for pair in packed.adapters[slot].factors(packed.arena.grad).values()
            ):
                for factor in pair:
                    factor.copy_(torch.randn(factor.shape, device="cuda", generator=generator))
            kept = packed.arena.grad[packed.adapters[2].range].clone()
            rates = {0: (1e-3, 1e-3), 1: (1e-3, 4e-3)} | ({2: (2e-3, 2e-3)} if step % 2 else {})
            optimizer.step(rates, torch.zeros(packed.capacity, device="cuda"))
            if 2 not in rates:
                assert torch.equal(packed.arena.grad[packed.adapters[2].range], kept)
        assert torch.equal(packed.arena.shadow, packed.arena.weight.to(dtype))
        return packed

    ours, theirs, exact = train("cuda"), train("reference"), train("reference", "exact")
    for slot in range(3):
        span = ours.adapters[slot].range
        truth = theirs.arena.weight[span].double()
        # Codes that rounding has moved by one add up; still the two differ far less than 8 bits do from fp32.
        bound = 1e-6 if state == "exact" else 0.2 * relative(exact.arena.weight[span], truth)
        assert relative(ours.arena.weight[span], truth) < bound


def test_arguments_are_checked() -> None:
    problem = Problem("exact")
    problem.shadow = problem.shadow[:-1]
    with pytest.raises(RuntimeError, match="shadow must have shape"):
        problem.step()
