"""pack_adapters: the packed model equals each adapter's own model, however it is run or changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from plora import AdapterConfig, pack_adapters
from tests.modules.toy import Toy, loss, randomise, tokens

CONFIGS = [
    AdapterConfig(rank=4, dropout=0.3, seed=1),
    AdapterConfig(rank=7, alpha=3, target_modules=("q_proj", "down_proj"), seed=2),
    AdapterConfig(rank=2, alpha=8, rslora=True, seed=3),
]
COUNTS = [5, 3, 4]


def packed_toy(configs=CONFIGS, **options):
    model = Toy()
    packed = pack_adapters(model, configs, **options)
    randomise(packed)
    return model, packed


def step(model, counts=COUNTS, **options):
    """Logits and every adapter's gradient by layer, of one forward and backward."""
    packed = model.get_submodule("plora") if isinstance(model, nn.Module) else model
    packed.zero_grad_()
    with packed.route(counts, steps=dict.fromkeys(packed.slots, 5), **options):
        logits = model(tokens(sum(counts)))
        loss(logits).backward()
    grads = {
        s: {k: (a.clone(), b.clone()) for k, (a, b) in ad.factors(packed.arena.grad).items()}
        for s, ad in packed.adapters.items()
    }
    return logits.detach(), grads


def assert_same(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    assert got[1].keys() == expected[1].keys()
    for slot, layers in expected[1].items():
        for path, pair in layers.items():
            for mine, theirs in zip(got[1][slot][path], pair, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def merged(adapter) -> Toy:
    """The toy with one adapter's product as an ordinary differentiable weight."""
    model = Toy()
    model.requires_grad_(False)
    for path, (a, b) in adapter.factors().items():
        linear = model.get_submodule(path)
        linear.a, linear.b = a.clone().requires_grad_(), b.clone().requires_grad_()
        delta = adapter.config.scale
        linear.forward = lambda x, m=linear, s=delta: (
            nn.functional.linear(x, m.weight, m.bias) + s * (x @ m.a.T @ m.b.T)
        )
    return model


def test_rows_follow_their_own_adapter():
    model, packed = packed_toy()
    logits, grads = step(model, dropout=False)
    everything, start = tokens(sum(COUNTS)), 0
    weight = torch.linspace(0.5, 1, logits.numel()).view_as(logits)
    for slot, count in enumerate(COUNTS):
        rows = slice(start, start + count)
        alone = merged(packed.adapters[slot])
        expected = alone(everything[rows])
        torch.testing.assert_close(logits[rows], expected, rtol=1e-5, atol=1e-5)
        (expected.sin() * weight[rows]).sum().backward()
        for path, (da, db) in grads[slot].items():
            torch.testing.assert_close(da, alone.get_submodule(path).a.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(db, alone.get_submodule(path).b.grad, rtol=1e-4, atol=1e-5)
        start += count


def test_layer_zero_over_a_frozen_embedding_gets_gradients():
    model, packed = packed_toy()
    _, grads = step(model)
    assert all(a.abs().sum() > 0 and b.abs().sum() > 0 for a, b in grads[0].values())


@pytest.mark.parametrize("whole", [False, True], ids=["per layer", "whole"])
def test_compiled_equals_eager_for_any_lengths(whole):
    model, _ = packed_toy()
    compiled = copy.deepcopy(model)
    if whole:
        compiled.compile(fullgraph=True, dynamic=True)
    else:
        for layer in compiled.layers:
            layer.compile(fullgraph=True, dynamic=True)
    for counts in (COUNTS, [6, 0, 2], [1, 9, 3]):
        assert_same(step(compiled, counts), step(model, counts))


class Checkpointed(nn.Module):
    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


def checkpointed(model, reentrant):
    for i, layer in enumerate(model.layers):
        model.layers[i] = Checkpointed(layer, reentrant)
    return model


@pytest.mark.parametrize("compiled", [False, True])
def test_activation_checkpointing(compiled):
    model, _ = packed_toy()
    other = checkpointed(copy.deepcopy(model), reentrant=False)
    if compiled:
        other.compile(dynamic=True)
    expected, got = step(model), step(other)
    renamed = {s: {k.replace(".layer.", "."): v for k, v in layers.items()} for s, layers in got[1].items()}
    assert_same((got[0], renamed), expected)


def test_reentrant_checkpointing_is_refused():
    model, packed = packed_toy()
    checkpointed(model, reentrant=True)
    with packed.route(COUNTS):
        x = model.embed_tokens(tokens(sum(COUNTS))).requires_grad_()
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            model.layers[0](x).sum().backward()


def test_base_rows_see_the_base_alone():
    model, packed = packed_toy()
    with packed.route([2, 0, 0], base_tokens=3), torch.no_grad():
        logits = model(tokens(5))
    base = Toy()(tokens(5))
    torch.testing.assert_close(logits[2:], base[2:], rtol=0, atol=0)
    assert not torch.allclose(logits[:2], base[:2])


def test_values_of_one_adapter_change_no_bit_of_another():
    model, packed = packed_toy()
    logits, grads = step(model)
    with torch.no_grad():
        packed.adapters[1].A.fill_(float("nan"))
    poisoned_logits, poisoned = step(model)
    assert poisoned_logits[5:8].isnan().all()
    keep = [0, 1, 2, 3, 4, 8, 9, 10, 11]
    assert torch.equal(poisoned_logits[keep], logits[keep])
    for slot in (0, 2):
        for path, pair in grads[slot].items():
            assert all(torch.equal(x, y) for x, y in zip(pair, poisoned[slot][path], strict=True))


def test_dropout_does_not_depend_on_the_pack():
    model, packed = packed_toy()
    logits, grads = step(model)
    alone_model = Toy()
    alone = pack_adapters(alone_model, CONFIGS[:1])
    alone.adapters[0].load_factors(packed.adapters[0].factors())
    alone_logits, _ = step(alone_model, COUNTS[:1])
    torch.testing.assert_close(logits[:5], alone_logits, rtol=1e-6, atol=1e-6)
    undropped, _ = step(model, dropout=False)
    assert not torch.allclose(undropped[:5], logits[:5])
    torch.testing.assert_close(undropped[5:], logits[5:], rtol=0, atol=0)


def test_eval_mode_switches_dropout_off():
    model, packed = packed_toy()
    model.eval()
    with packed.route(COUNTS):
        first = model(tokens(12))
    with packed.route(COUNTS, dropout=False):
        torch.testing.assert_close(first, model(tokens(12)), rtol=0, atol=0)


def test_initialisation_depends_on_the_seed_alone():
    _, packed = packed_toy()
    _, other = packed_toy([CONFIGS[2], CONFIGS[0]])
    for path, (a, _) in packed.adapters[0].factors().items():
        assert torch.equal(a, other.adapters[1].factors()[path][0])
        assert a.abs().max() <= 1 / a.shape[1] ** 0.5


def test_torch_optimizers_and_zero_grad():
    model, packed = packed_toy()
    optimizers = {s: torch.optim.AdamW(a.parameters(), lr=0.01 * (s + 1)) for s, a in packed.adapters.items()}
    _, first = step(model)
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()  # sets .grad to None
    packed.arena.grad.fill_(7.0)  # must not leak into the next step
    with packed.route(COUNTS, steps=dict.fromkeys(packed.slots, 5)):
        loss(model(tokens(12))).backward()
    again = {
        s: {k: (a.clone(), b.clone()) for k, (a, b) in ad.factors(packed.arena.grad).items()}
        for s, ad in packed.adapters.items()
    }
    assert_same((torch.zeros(1), again), (torch.zeros(1), step(model)[1]))
    assert not torch.allclose(again[0]["layers.0.q_proj"][0], first[0]["layers.0.q_proj"][0])


def test_optimizers_survive_a_growing_arena_and_a_move():
    model, packed = packed_toy()
    optimizer = torch.optim.SGD(packed.adapters[0].parameters(), lr=1.0)
    packed.add(AdapterConfig(rank=128))
    model.to(torch.float64).to(torch.float32)
    before = packed.adapters[0].factors()["layers.0.q_proj"][0].clone()
    _, grads = step(model)
    optimizer.step()
    moved = before - packed.adapters[0].factors()["layers.0.q_proj"][0]
    torch.testing.assert_close(moved, grads[0]["layers.0.q_proj"][0], rtol=1e-4, atol=1e-6)


def test_add_and_remove_leave_the_others_alone():
    model, packed = packed_toy()
    expected, _ = step(model, dropout=False)
    slots = [packed.add(AdapterConfig(rank=rank, seed=rank)) for rank in (64, 1, 16)]
    assert slots == [3, 4, 5]
    packed.remove(1)
    packed.remove(4)
    assert packed.slots == [0, 2, 3, 5]
    assert packed.add(CONFIGS[1]) == 1
    assert packed.slots == [0, 1, 2, 3, 5]
    got, _ = step(model, [5, 3, 4, 0, 0, 2], dropout=False)
    for rows in (slice(0, 5), slice(8, 12)):
        torch.testing.assert_close(got[rows], expected[rows], rtol=1e-6, atol=1e-6)


def test_removed_memory_is_reused_and_clean():
    _, packed = packed_toy()
    numel = packed.arena.numel
    moments = packed.arena.attach("exp_avg")
    moments.fill_(3.0)
    for _ in range(100):
        packed.remove(1)
        packed.add(CONFIGS[1])
    assert packed.arena.numel == numel
    assert moments[packed.adapters[1].range].abs().sum() == 0
    assert moments[packed.adapters[0].range].min() == 3.0


def test_tables_grow_beyond_capacity():
    model, packed = packed_toy(capacity=3)
    expected, _ = step(model)
    assert [packed.add(AdapterConfig(rank=1, seed=i)) for i in range(40)] == list(range(3, 43))
    logits, _ = step(model)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_the_shadow_of_a_new_or_loaded_adapter_is_up_to_date():
    model = Toy().to(torch.bfloat16)
    packed = pack_adapters(model, CONFIGS)
    packed.remove(1)
    slot = packed.add(AdapterConfig(rank=3, seed=9))
    assert torch.equal(packed.arena.shadow, packed.arena.weight.bfloat16())
    factors = {path: (a + 1, b + 2) for path, (a, b) in packed.adapters[slot].factors().items()}
    packed.adapters[slot].load_factors(factors)
    assert torch.equal(packed.arena.shadow, packed.arena.weight.bfloat16())


def test_cast_and_copy():
    model, packed = packed_toy()
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert other.plora.arena.weight.dtype == torch.float32
    assert other.plora.arena.weight.data_ptr() != packed.arena.weight.data_ptr()
    with torch.no_grad():
        other.plora.adapters[0].A.add_(1.0)  # as an optimizer does; route() must see it
    with other.plora.route(COUNTS, dropout=False):
        logits = other(tokens(12))
        logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert torch.equal(other.plora.arena.shadow, other.plora.arena.weight.bfloat16())
    assert packed.arena.grad.abs().sum() == 0 and other.plora.arena.grad.abs().sum() > 0


def test_bf16_is_as_close_as_bf16_can_be():
    model, packed = packed_toy()
    half = copy.deepcopy(model).to(torch.bfloat16)
    expected, expected_grads = step(model, dropout=False)
    half.plora.zero_grad_()
    with half.plora.route(COUNTS, dropout=False):
        logits = half(tokens(12))
        loss(logits.float()).backward()
    assert (logits.float() - expected).norm() / expected.norm() < 0.02
    for path, (a, b) in half.plora.adapters[2].factors(half.plora.arena.grad).items():
        for mine, theirs in zip((a, b), expected_grads[2][path], strict=True):
            assert (mine - theirs).norm() / theirs.norm() < 0.05


def test_unpack_restores_the_model():
    model, packed = packed_toy()
    packed.unpack(model)
    assert not any("plora" in name or "base" in name for name, _ in model.named_modules())
    torch.testing.assert_close(model(tokens(4)), Toy()(tokens(4)), rtol=0, atol=0)
    pack_adapters(model, CONFIGS)


def test_unpack_lets_train_again_what_did():
    model = Toy()
    model.embed_tokens.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    packed = pack_adapters(model, CONFIGS)
    other, _ = packed_toy()
    with pytest.raises(ValueError, match="not those of this Toy"):
        packed.unpack(other)
    packed.unpack(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    with pytest.raises(ValueError, match="not those of this Toy"):
        packed.unpack(model)


def test_an_optimizer_of_a_removed_adapter_leaves_the_next_one_alone():
    model, packed = packed_toy([AdapterConfig(rank=4, seed=1), AdapterConfig(rank=4, seed=2)])
    optimizer = torch.optim.AdamW(packed.parameters(), lr=0.1)
    step(model, [6, 6])
    optimizer.step()
    packed.zero_grad_()
    removed = packed.adapters[0]
    packed.remove(0)
    with pytest.raises(ValueError, match="slot 0 was removed"):
        removed.factors()
    slot = packed.add(AdapterConfig(rank=4, seed=3))
    fresh = packed.adapters[slot]
    assert fresh.range == slice(0, fresh.layout.numel)  # the memory of the removed one
    weights = fresh.A.detach().clone()
    step(model, [6, 6])
    optimizer.step()
    torch.testing.assert_close(fresh.A.detach(), weights, rtol=0, atol=0)


def test_weights_loaded_by_assignment_are_trained():
    model, packed = packed_toy()
    saved = copy.deepcopy(model.state_dict())
    other, loaded = packed_toy()
    loaded.arena.weight.zero_()
    other.load_state_dict(saved, assign=True)
    assert_same(step(other), step(model), 0)
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert not torch.equal(loaded.arena.weight, packed.arena.weight)


@pytest.mark.parametrize(
    ("configs", "options", "error", "message"),
    [
        (AdapterConfig(), {}, TypeError, r"write \[config\]"),
        ([{"rank": 4}], {}, TypeError, "plora.AdapterConfig, got {'rank': 4}"),
        (CONFIGS, {"dtype": torch.int32}, ValueError, "got torch.int32"),
        (CONFIGS, {"dtype": "bf16"}, ValueError, "got 'bf16'"),
    ],
)
def test_bad_arguments(configs, options, error, message):
    model = Toy()
    with pytest.raises(error, match=message):
        pack_adapters(model, configs, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_pack_without_capacity_takes_an_adapter():
    packed = pack_adapters(Toy(), [], capacity=0)
    assert [packed.add(config) for config in CONFIGS] == [0, 1, 2]


@pytest.mark.parametrize("counts", [12, None, "ab"])
def test_a_route_takes_counts(counts):
    _, packed = packed_toy()
    with pytest.raises(TypeError, match=f"got {counts!r}"), packed.route(counts):
        pass


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ([1, 2, -1], {}, "negative"),
        ({9: 1}, {}, "no adapter"),
        ([1], {"base_tokens": -1}, "base_tokens"),
        ([1, 1], {"token_index": torch.zeros(3)}, "token_index"),
    ],
)
def test_bad_routes(counts, options, message):
    _, packed = packed_toy()
    with pytest.raises(ValueError, match=message), packed.route(counts, **options):
        pass


def test_rows_must_match_the_route():
    model, packed = packed_toy()
    with packed.route(COUNTS), pytest.raises(RuntimeError, match="11 rows but route"):
        model(tokens(11))
    with pytest.raises(RuntimeError, match="outside of"):
        model(tokens(12))


def test_backward_after_the_next_route_is_refused():
    model, packed = packed_toy()
    with packed.route(COUNTS):
        logits = model(tokens(12))
    with packed.route([4, 4, 4]):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


@pytest.mark.parametrize(
    ("name", "message"), [("q_pro", "did you mean 'q_proj'"), ("lm_head", "output head"), ("embed_tokens", "embedding")]
)
def test_unknown_targets(name, message):
    with pytest.raises(ValueError, match=message):
        pack_adapters(Toy(), [AdapterConfig(target_modules=(name,))])


def test_a_sequential_is_refused():
    with pytest.raises(ValueError, match="nn.Sequential"):
        pack_adapters(nn.Sequential(Toy()), CONFIGS)
    with pytest.raises(ValueError, match="nn.Linear cannot replace itself"):
        pack_adapters(nn.Linear(2, 2), CONFIGS)


def test_a_pack_is_not_pickled():
    model, packed = packed_toy()
    for pickled in (model, packed):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(pickled)


def test_packing_twice_is_refused():
    model, _ = packed_toy()
    with pytest.raises(ValueError, match="packed already"):
        pack_adapters(model, CONFIGS)


def test_saving_a_packed_hugging_face_model_is_refused(tmp_path):
    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    packed = pack_adapters(model, CONFIGS)
    with pytest.raises(ValueError, match=r"after packed\.unpack\(model\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    packed.unpack(model)
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(packed_toy()[0], "save_pretrained")


@pytest.mark.parametrize(
    "bad",
    [
        *({"rank": 0}, {"rank": 257}, {"rank": 2.5}, {"alpha": 0}, {"alpha": "32"}, {"alpha": None}, {"alpha": True}),
        *({"dropout": 1.0}, {"dropout": "0.1"}, {"dropout": None}, {"rslora": "no"}, {"seed": 1.5}, {"seed": None}),
        *({"target_modules": ()}, {"target_modules": 3}, {"target_modules": ("q_proj", 3)}),
    ],
)
def test_bad_settings_name_the_value(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdapterConfig(**bad)
