"""PackedAdamW against torch.optim.AdamW and clip_grad_norm_."""

import pytest
import torch
from torch import nn

from plora.modules.config import AdapterConfig
from plora.modules.packed import PackedAdapters, pack_adapters
from plora.training.optimizer import AdamWConfig, PackedAdamW, _norm


class Model(nn.Module):
    """Odd widths, so that factors have padding behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(13, 7)
        self.down_proj = nn.Linear(7, 13)


CONFIGS = [
    AdapterConfig(rank=3, seed=1),
    AdapterConfig(rank=8, target_modules=("q_proj",)),
    AdapterConfig(rank=1, seed=2),
]
HYPER = [
    AdamWConfig(max_grad_norm=0.5),
    AdamWConfig(betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1),
    AdamWConfig(weight_decay=0.01, max_grad_norm=100.0),
]
RATIOS = [1.0, 4.0, 1.0]


@pytest.fixture
def packed() -> PackedAdapters:
    torch.manual_seed(0)
    return pack_adapters(Model(), CONFIGS)


def _optimizer(packed: PackedAdapters) -> PackedAdamW:
    optimizer = PackedAdamW(packed)
    for slot, hyper in enumerate(HYPER):
        optimizer.add(slot, hyper)
    return optimizer


def _fill_gradients(packed: PackedAdapters, slot: int, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 * step + slot)
    for pair in packed.adapters[slot].factors(packed.arena.grad).values():
        for factor in pair:
            factor.copy_(scale * torch.randn(factor.shape, generator=generator))


def _lr(step: int) -> float:
    return 1e-2 / (1 + step)


def test_fifty_steps_equal_torch_adamw_and_clip(packed: PackedAdapters) -> None:
    optimizer = _optimizer(packed)
    twins = []
    for slot, (hyper, ratio) in enumerate(zip(HYPER, RATIOS, strict=True)):
        pairs = packed.adapters[slot].factors().values()
        a, b = ([nn.Parameter(pair[i].detach().clone().double()) for pair in pairs] for i in (0, 1))
        groups = [{"params": a, "ratio": 1.0}, {"params": b, "ratio": ratio}]
        twins.append(torch.optim.AdamW(groups, betas=hyper.betas, eps=hyper.eps, weight_decay=hyper.weight_decay))
    losses = torch.zeros(packed.capacity)
    for step in range(50):
        # Slot 2 completes a batch only every third round.
        active = [0, 1, 2] if step % 3 == 0 else [0, 1]
        for slot in active:
            _fill_gradients(packed, slot, step, scale=3.0 if step % 2 else 0.01)
        grads = {s: list(packed.adapters[s].factors(packed.arena.grad).values()) for s in active}
        for slot in active:
            twin = twins[slot]
            for which, group in enumerate(twin.param_groups):
                group["lr"] = _lr(step) * group["ratio"]
                for parameter, pair in zip(group["params"], grads[slot], strict=True):
                    parameter.grad = pair[which].double()
            everything = [p for group in twin.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(everything, HYPER[slot].max_grad_norm or float("inf"))
            twin.step()
            grads[slot] = norm
        outcome = optimizer.step({s: (_lr(step), _lr(step) * RATIOS[s]) for s in active}, losses)
        for slot in active:
            assert outcome.grad_norm[slot].item() == pytest.approx(grads[slot].item(), rel=1e-5)
        assert not outcome.skipped.any()
    for slot, twin in enumerate(twins):
        for which, group in enumerate(twin.param_groups):
            for ours, theirs in zip(packed.adapters[slot].factors().values(), group["params"], strict=True):
                error = (ours[which].double() - theirs).norm() / theirs.norm()
                assert error < 2e-6, (slot, which)


@pytest.mark.parametrize("where", ["loss", "gradient", "infinite gradient"])
def test_skip_leaves_weights_moments_and_count_bit_for_bit_and_others_go_on(packed: PackedAdapters, where: str) -> None:
    def run(poison: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        pack = pack_adapters(Model(), CONFIGS)
        optimizer = _optimizer(pack)
        losses = torch.zeros(pack.capacity)
        for step in range(3):
            for slot in range(3):
                _fill_gradients(pack, slot, step)
            if step == 2:
                before = pack.arena.weight[pack.adapters[0].range].clone(), optimizer.state(0)
                if poison:
                    losses[0] = float("nan") if where == "loss" else 0.0
                    if where != "loss":
                        pack.arena.grad[pack.adapters[0].range][5] = float("nan" if where == "gradient" else "inf")
            outcome = optimizer.step({slot: (1e-2, 1e-2) for slot in range(3)}, losses)
        assert outcome.skipped.tolist()[:3] == [float(poison), 0.0, 0.0]
        if poison:
            assert torch.equal(pack.arena.weight[pack.adapters[0].range], before[0])
            assert all(torch.equal(now, before[1][name]) for name, now in optimizer.state(0).items())
            assert optimizer.state(1)["step"] == 3
        return pack.arena.weight.clone(), optimizer.state(1), optimizer.state(2)

    torch.manual_seed(0)
    clean, poisoned = run(False), run(True)
    for slot in (1, 2):
        span = packed.adapters[slot].range
        assert torch.equal(clean[0][span], poisoned[0][span])
        assert all(torch.equal(clean[slot][name], poisoned[slot][name]) for name in clean[slot])


def test_lr_zero_keeps_the_weights_exactly(packed: PackedAdapters) -> None:
    optimizer = _optimizer(packed)
    before = packed.arena.weight.clone()
    for step in range(3):
        for slot in range(3):
            _fill_gradients(packed, slot, step)
        optimizer.step({slot: (0.0, 0.0) for slot in range(3)}, torch.zeros(packed.capacity))
    assert torch.equal(packed.arena.weight, before)


def test_only_named_slots_change(packed: PackedAdapters) -> None:
    optimizer = _optimizer(packed)
    before = packed.arena.weight.clone()
    for slot in range(3):
        _fill_gradients(packed, slot, 0)
    optimizer.step({1: (1e-2, 1e-2)}, torch.zeros(packed.capacity))
    changed = packed.arena.weight != before
    assert changed[packed.adapters[1].range].any()
    assert not changed[packed.adapters[0].range].any()
    assert not changed[packed.adapters[2].range].any()


def test_padding_stays_zero(packed: PackedAdapters) -> None:
    optimizer = _optimizer(packed)
    for slot in range(3):
        _fill_gradients(packed, slot, 0)
    optimizer.step({slot: (1e-2, 1e-2) for slot in range(3)}, torch.zeros(packed.capacity))
    owned = torch.zeros_like(packed.arena.weight)
    for adapter in packed.adapters.values():
        for pair in adapter.factors(owned).values():
            for factor in pair:
                factor.fill_(1.0)
    padding = owned == 0
    assert padding.any()
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert not packed.arena.attach(name)[padding].any()


def test_state_can_be_parked_and_resumed_in_another_slot(packed: PackedAdapters) -> None:
    def steps(pack: PackedAdapters, optimizer: PackedAdamW, slot: int, which: range) -> None:
        for step in which:
            generator = torch.Generator().manual_seed(step)
            for pair in pack.adapters[slot].factors(pack.arena.grad).values():
                for factor in pair:
                    factor.copy_(torch.randn(factor.shape, generator=generator))
            optimizer.step({slot: (1e-2, 2e-2)}, torch.zeros(pack.capacity))

    optimizer = _optimizer(packed)
    steps(packed, optimizer, 0, range(6))
    straight = packed.arena.weight[packed.adapters[0].range].clone()

    other = pack_adapters(Model(), [CONFIGS[1]])
    optimizer = PackedAdamW(other)
    slot = other.add(CONFIGS[0])
    optimizer.add(slot, HYPER[0])
    steps(other, optimizer, slot, range(3))
    weights, state = other.arena.weight[other.adapters[slot].range].clone(), optimizer.state(slot)
    optimizer.remove(slot)
    other.remove(slot)
    assert other.add(CONFIGS[2]) == slot
    slot = other.add(CONFIGS[0])
    optimizer.add(slot, HYPER[0])
    other.arena.weight[other.adapters[slot].range] = weights
    optimizer.load_state(slot, state)
    steps(other, optimizer, slot, range(3, 6))
    assert torch.equal(other.arena.weight[other.adapters[slot].range], straight)
    with pytest.raises(ValueError, match="another rank"):
        _optimizer(packed).load_state(1, state)


def test_reused_slot_starts_fresh(packed: PackedAdapters) -> None:
    optimizer = _optimizer(packed)
    _fill_gradients(packed, 0, 0)
    optimizer.step({0: (1e-2, 1e-2)}, torch.zeros(packed.capacity))
    optimizer.remove(0)
    optimizer.add(0, HYPER[1])
    assert not any(value.any() for value in optimizer.state(0).values())


def test_shadow_follows_the_weights() -> None:
    pack = pack_adapters(Model().bfloat16(), CONFIGS)
    optimizer = _optimizer(pack)
    _fill_gradients(pack, 0, 0)
    optimizer.step({0: (1e-1, 1e-1)}, torch.zeros(pack.capacity))
    assert torch.equal(pack.arena.shadow, pack.arena.weight.bfloat16())


def test_norm_of_many_elements_is_exact() -> None:
    flat = torch.randn(3_000_017, generator=torch.Generator().manual_seed(0))
    assert _norm(flat).item() == pytest.approx(flat.double().norm().item(), rel=1e-6)
    assert _norm(flat[:5]).item() == pytest.approx(flat[:5].double().norm().item(), rel=1e-6)
    assert _norm(flat[:0]) == 0
