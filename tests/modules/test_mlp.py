"""Gated MLPs: recognised by what they compute, and equal to their linears one by one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune.modules import FeedForward

from plora import AdapterConfig, pack_adapters
from plora.modules import linear, mlp
from tests.modules.test_packed import assert_same
from tests.modules.toy import randomise

DIM, WIDE, ROWS = 16, 24, [5, 0, 3, 4]
CONFIGS = [
    AdapterConfig(rank=4, dropout=0.3, seed=1),
    AdapterConfig(rank=3, seed=2),
    AdapterConfig(rank=7, alpha=3, target_modules=("up_proj",), seed=3),
    AdapterConfig(rank=2, alpha=8, target_modules=("down_proj", "gate_proj"), seed=4),
]


class HuggingFaceLike(nn.Module):
    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(DIM, WIDE)
        self.up_proj = nn.Linear(DIM, WIDE, bias=False)
        self.down_proj = nn.Linear(WIDE, DIM, bias=False)
        self.act_fn = activation or nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UpFirst(HuggingFaceLike):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = self._modules.pop("gate_proj")


class Clipped(HuggingFaceLike):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).clamp(-1, 1))


def torchtune() -> nn.Module:
    linears = {"gate_proj": (DIM, WIDE), "up_proj": (DIM, WIDE), "down_proj": (WIDE, DIM)}
    return FeedForward(**{name: nn.Linear(*shape) for name, shape in linears.items()})


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block, copy.deepcopy(block)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def packed(block: nn.Module) -> tuple[Model, nn.Module]:
    model = Model(block)
    adapters = pack_adapters(model, CONFIGS)
    randomise(adapters, 0.1)
    return model, adapters


def step(model, adapters):
    adapters.zero_grad_()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(sum(ROWS), DIM, generator=generator).requires_grad_()
    with adapters.route(ROWS, steps=dict.fromkeys(adapters.slots, 5)):
        out = model(x)
        out.sin().sum().backward()
    grads = {
        slot: {path: (a.clone(), b.clone()) for path, (a, b) in each.factors(adapters.arena.grad).items()}
        for slot, each in adapters.adapters.items()
    }
    return torch.cat([out.detach(), x.grad]), grads


@pytest.mark.parametrize("make", [HuggingFaceLike, torchtune])
@pytest.mark.parametrize("compiled", [False, True])
def test_equals_its_linears_one_by_one(make, compiled, monkeypatch):
    torch.manual_seed(0)
    block = make()
    model, adapters = packed(copy.deepcopy(block))
    assert type(model.layers[0]).__name__.startswith("Fused")
    monkeypatch.setattr("plora.modules.packed.fuse_gated_mlps", lambda model: None)
    plain = packed(block)
    assert not type(plain[0].layers[0]).__name__.startswith("Fused")
    if compiled:
        model.compile(fullgraph=True, dynamic=True)
    assert_same(step(model, adapters), step(*plain), tolerance=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_residual_rides_along(fused, monkeypatch):
    """On an MLP and on a single linear: the same as adding it, gradients too."""
    torch.manual_seed(0)
    block = HuggingFaceLike()
    if not fused:
        monkeypatch.setattr("plora.modules.packed.fuse_gated_mlps", lambda model: None)
    model, adapters = packed(block)
    layer = model.layers[0]
    x, residual = torch.randn(2, sum(ROWS), DIM).unbind()
    riders = [layer, layer.down_proj] if fused else [layer.down_proj]
    assert not getattr(HuggingFaceLike(), "takes_residual", False)
    for module in riders:
        inputs = x if module is layer else torch.randn(sum(ROWS), WIDE)
        results = []
        for run in (linear.add, lambda residual, module, x: residual + module(x)):
            adapters.zero_grad_()
            leaves = [residual.clone().requires_grad_(), inputs.clone().requires_grad_()]
            with adapters.route(ROWS, steps=dict.fromkeys(adapters.slots, 5)):
                out = run(leaves[0], module, leaves[1])
                out.sin().sum().backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves), adapters.arena.grad.clone()])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_a_residual_of_another_precision_is_not_rounded():
    model = Model(HuggingFaceLike())
    adapters = pack_adapters(model, CONFIGS, dtype=torch.bfloat16)
    layer, x = model.layers[0], torch.randn(sum(ROWS), DIM)
    residual = 100 * torch.randn(sum(ROWS), DIM)
    with adapters.route(ROWS):
        assert torch.equal(linear.add(residual, layer, x), residual + layer(x))


@pytest.mark.parametrize("block", [HuggingFaceLike(nn.GELU()), Clipped(), UpFirst()])
def test_others_stay_as_they_are(block):
    model, _ = packed(block)
    assert type(model.layers[0]) is type(block)


def test_unpack_restores_the_class():
    block = HuggingFaceLike()
    model, adapters = packed(block)
    adapters.unpack(model)
    assert type(model.layers[0]) is HuggingFaceLike
    x = torch.randn(3, DIM)
    gate, up = F.silu(block.gate_proj(x)), block.up_proj(x)
    torch.testing.assert_close(model.layers[0](x), block.down_proj(gate * up))


def test_a_packed_model_is_copied_but_not_pickled():
    torch.manual_seed(0)
    model, adapters = packed(HuggingFaceLike())
    twin = copy.deepcopy(model)
    assert type(twin.layers[0]) is type(model.layers[0])
    for pickled in (model, adapters):
        with pytest.raises(TypeError, match=r"save packed\.state_dict\(\)"):
            torch.save(pickled, io.BytesIO())
    expected = step(model, adapters)
    adapters.unpack(model)
    assert_same(step(twin, twin.plora), expected)
    torch.save(model, io.BytesIO())


def test_trying_the_formula_leaves_the_module_alone():
    block = HuggingFaceLike()
    before = [block.gate_proj, block.up_proj, block.down_proj]
    assert mlp._computes_swiglu(block, ("gate_proj", "up_proj", "down_proj"))
    assert [block.gate_proj, block.up_proj, block.down_proj] == before
    assert block.training
