"""Each family on packed sequences against transformers on single ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from plora.models import BaseModel, KVCache, ModelError, PackedSequences, from_config, from_pretrained
from plora.models.presets import preset_config
from tests.models import tiny

RAGGED = [5, 17, 1, 130, 5]
_SMALL = {
    "num_hidden_layers": 6,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
FAMILIES = list(tiny.CONFIGS)


def _tokens(lengths: list[int], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, (sum(lengths),), generator=torch.Generator().manual_seed(seed))


def _hidden(base: BaseModel, lengths: list[int], seed: int = 0) -> torch.Tensor:
    sequences = PackedSequences.from_lengths(lengths, base.device)
    return base.hidden_states(_tokens(lengths, seed).to(base.device), sequences.positions(), sequences)


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def _reference_logits(model: PreTrainedModel, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.cat([model(part[None]).logits[0] for part in tokens.split(lengths)])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_single_ones(
    family: str, folders: dict[str, Path], references: dict[str, PreTrainedModel]
) -> None:
    base = from_pretrained(folders[family])
    with torch.no_grad():
        ours = base.logits(_hidden(base, RAGGED))
        theirs = _reference_logits(references[family], _tokens(RAGGED), RAGGED)
    assert _relative(ours, theirs) < 1e-5
    assert base.spec.n_params == sum(p.numel() for p in references[family].parameters())
    assert type(base).__name__ == ("TorchtuneModel" if family in tiny.TORCHTUNE else "HuggingFaceModel")
    linears = {base.hf_name(path).rsplit(".", 1)[-1] for path, m in base.module.named_modules() if _is_linear(m)}
    assert linears - {"lm_head"} == {linear.name for linear in base.spec.linears}


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gradients_equal_transformers(
    family: str, checkpointing: bool, folders: dict[str, Path], references: dict[str, PreTrainedModel]
) -> None:
    """The gradient of the first layer's weights passes through everything that adapters' gradients pass through."""
    base = from_pretrained(folders[family], activation_checkpointing=checkpointing)
    assert not any(parameter.requires_grad for parameter in base.module.parameters())
    model = copy.deepcopy(references[family])
    grads = []
    for module, name in ((base.module, None), (model, "model.layers.0.self_attn.q_proj")):
        path = name or next(p for p, _ in base.module.named_modules() if p.endswith("q_proj"))
        weight = module.get_submodule(path).weight.requires_grad_()
        logits = _reference_logits(model, _tokens(RAGGED), RAGGED) if name else base.logits(_hidden(base, RAGGED))
        grads.append(torch.autograd.grad(logits.square().mean(), weight)[0])
        if not name and (rows := base.export_rows(path)) is not None:
            grads[0] = grads[0][rows]
    assert _relative(*grads) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpointing_keeps_names_and_can_be_undone(family: str, folders: dict[str, Path]) -> None:
    base = from_pretrained(folders[family])
    names = [name for name, _ in base.module.named_modules()]
    kind = type(base.layers[0])
    base.set_activation_checkpointing(True)
    base.set_activation_checkpointing(True)
    assert base.activation_checkpointing
    assert [name for name, _ in base.module.named_modules()] == names
    base.set_activation_checkpointing(False)
    assert not base.activation_checkpointing
    assert type(base.layers[0]) is kind


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpointing_recomputes_layers(family: str, folders: dict[str, Path]) -> None:
    base = from_pretrained(folders[family])
    runs = []
    norm = next(m for p, m in base.layers[0].named_modules() if p in ("sa_norm", "input_layernorm"))
    norm.register_forward_hook(lambda *_: runs.append(1))
    for checkpointing, expected in ((False, 1), (True, 2)):
        base.set_activation_checkpointing(checkpointing)
        runs.clear()
        _hidden(base, [3, 4]).sum().backward()
        assert len(runs) == expected


@pytest.mark.parametrize(
    ("count", "recomputed"), [(0, []), (1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4])]
)
def test_checkpointing_of_some_layers(count: int, recomputed: list[int]) -> None:
    """Spread evenly, the last one not among them, and the gradient stays."""
    base = from_config({**preset_config("Qwen/Qwen2.5-0.5B"), **_SMALL})
    runs: list[int] = []
    for index, layer in enumerate(base.layers):
        norm = next(m for p, m in layer.named_modules() if p in ("sa_norm", "input_layernorm"))
        norm.register_forward_hook(lambda *_, index=index: runs.append(index))
    weight = base.embedding.weight.requires_grad_()
    gradients = []
    for setting in (True, count):
        base.set_activation_checkpointing(setting)
        runs.clear()
        gradients.append(torch.autograd.grad(_hidden(base, [3, 4]).square().sum(), weight)[0])
    assert sorted(index for index in range(6) if runs.count(index) == 2) == recomputed
    assert torch.equal(*gradients)
    assert base.activation_checkpointing == (count or False)


def test_checkpointing_of_more_layers_than_there_are() -> None:
    base = from_config({**preset_config("Qwen/Qwen2.5-0.5B"), **_SMALL})
    base.set_activation_checkpointing(6)
    assert base.activation_checkpointing is True
    for count in (7, -1):
        with pytest.raises(ValueError, match=f"from 0 to the 6 layers, got {count}"):
            base.set_activation_checkpointing(count)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_transformers(
    family: str, folders: dict[str, Path], references: dict[str, PreTrainedModel]
) -> None:
    base, model = from_pretrained(folders[family]), references[family]
    prompts = [[3, 4, 5], [7], [9, 10, 11, 12, 13, 14], [1, 2]]
    # Rows leave after 4, 8, 8 and 12 tokens, as finished answers do.
    budgets = [4, 8, 12, 8]
    answers = _generate(base, prompts, budgets)
    for prompt, answer, budget in zip(prompts, answers, budgets, strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=budget, do_sample=False)
        assert answer == whole[0, len(prompt) :].tolist()


@torch.no_grad()
def _generate(base: BaseModel, prompts: list[list[int]], budgets: list[int]) -> list[list[int]]:
    sequences = PackedSequences.from_lengths([len(prompt) for prompt in prompts])
    cache = KVCache(len(prompts), max_len=32)
    flat = torch.tensor([token for prompt in prompts for token in prompt])
    hidden = base.hidden_states(flat, sequences.positions(), cache.prefill(sequences))
    tokens = base.logits(hidden[sequences.cu_seqlens[1:].long() - 1]).argmax(-1)
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    while True:
        for row, token in zip(alive, tokens.tolist(), strict=True):
            answers[row].append(token)
        keep = [i for i, row in enumerate(alive) if len(answers[row]) < budgets[row]]
        if not keep:
            return answers
        cache.select(keep)
        alive, tokens = [alive[i] for i in keep], tokens[keep]
        tokens = base.logits(base.hidden_states(tokens, cache.lengths, cache.decode())).argmax(-1)


def test_prompts_can_be_run_in_parts(folders: dict[str, Path]) -> None:
    base = from_pretrained(folders["llama"])
    prompts = [[3, 4, 5], [7], [9, 10, 11, 12]]
    whole, parts = KVCache(3, 8), KVCache(3, 8)
    with torch.no_grad():
        for cache, groups in ((whole, [[0, 1, 2]]), (parts, [[2], [0, 1]])):
            for rows in groups:
                sequences = PackedSequences.from_lengths([len(prompts[row]) for row in rows])
                flat = torch.tensor([token for row in rows for token in prompts[row]])
                base.hidden_states(flat, sequences.positions(), cache.prefill(sequences, rows))
        assert parts.lengths.tolist() == whole.lengths.tolist() == [3, 1, 4]
        step = [base.hidden_states(torch.tensor([1, 2, 3]), c.lengths, c.decode()) for c in (whole, parts)]
    torch.testing.assert_close(*step)


def test_a_full_cache_is_refused() -> None:
    cache = KVCache(2, 4)
    with pytest.raises(ValueError, match="5 tokens exceeds the cache's 4"):
        cache.prefill(PackedSequences.from_lengths([5, 1]))
    with pytest.raises(ValueError, match="1 prompts for 2 rows"):
        cache.prefill(PackedSequences.from_lengths([3]))
    cache.host_lengths = [4, 2]
    with pytest.raises(ValueError, match="full at 4"):
        cache.decode()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("family", "checkpointing", "backend"),
    [
        ("llama", False, "inductor"),
        ("llama", True, "aot_eager"),
        ("qwen2", False, "aot_eager"),
        ("qwen2", True, "aot_eager"),
        ("qwen3", False, "aot_eager"),
        ("qwen3", True, "aot_eager"),
    ],
)
def test_compiled_layers_share_one_graph_for_all_batches(
    family: str, checkpointing: bool, backend: str, folders: dict[str, Path]
) -> None:
    eager = from_pretrained(folders[family])
    compiled = from_pretrained(folders[family], activation_checkpointing=checkpointing)
    compiled.compile_layers(fullgraph=True, backend=backend)
    weight = torch.randn(48)
    for lengths in (RAGGED, [7, 9], [200, 3, 4], [33] * 4, [300]):
        results = []
        for base in (eager, compiled):
            embedded: list[torch.Tensor] = []
            handle = base.embedding.register_forward_hook(lambda m, i, out, seen=embedded: seen.append(out))
            hidden = _hidden(base, lengths)
            handle.remove()
            results.append((hidden, torch.autograd.grad((hidden * weight).sum(), embedded[0])[0]))
        for ours, theirs in zip(*results, strict=True):
            assert _relative(ours, theirs) < 1e-5
        torch._dynamo.config.error_on_recompile = True
    assert counters["stats"]["unique_graphs"] == 1
    # Generation leaves the compiled graphs alone.
    assert _generate(compiled, [[3, 4], [5]], [3, 3]) == _generate(eager, [[3, 4], [5]], [3, 3])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_compiled_layers_take_no_constants_from_the_host(family: str, folders: dict[str, Path]) -> None:
    """A norm's epsilon as an input would be a tensor on the host, also for a model on a GPU."""
    shapes: list[torch.Size] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        shapes.extend(each.shape for each in inputs if isinstance(each, torch.Tensor))
        return graph.forward

    torch._dynamo.register_backend(backend, name=f"inputs_of_{family}")
    base = from_pretrained(folders[family])
    base.compile_layers(fullgraph=True, backend=f"inputs_of_{family}")
    _hidden(base, [3, 4])
    assert len(shapes) > 5
    assert torch.Size([]) not in shapes


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "qwen3"])
def test_deepcopy_is_independent(family: str, folders: dict[str, Path]) -> None:
    base = from_pretrained(folders[family], activation_checkpointing=True)
    base.compile_layers(backend="aot_eager")
    twin = copy.deepcopy(base)
    with torch.no_grad():
        expected = base.logits(_hidden(twin, [4, 3]))
        base.embedding.weight.zero_()
        assert torch.equal(twin.logits(_hidden(twin, [4, 3])), expected)
        assert not torch.equal(base.logits(_hidden(base, [4, 3])), expected)


def test_bf16(folders: dict[str, Path], references: dict[str, PreTrainedModel]) -> None:
    for family in ("llama", "qwen2", "qwen3"):
        base = from_pretrained(folders[family], dtype="bf16")
        assert base.dtype == torch.bfloat16
        with torch.no_grad():
            ours = base.logits(_hidden(base, [9, 20])).float()
            theirs = _reference_logits(references[family], _tokens([9, 20]), [9, 20])
        assert _relative(ours, theirs) < 0.05


@pytest.mark.parametrize(
    ("family", "path", "name"),
    [
        ("llama", "layers.2.attn.q_proj", "model.layers.2.self_attn.q_proj"),
        ("llama", "layers.0.attn.output_proj", "model.layers.0.self_attn.o_proj"),
        ("qwen2", "layers.1.mlp.w1", "model.layers.1.mlp.gate_proj"),
        ("qwen2", "layers.1.mlp.w2", "model.layers.1.mlp.down_proj"),
        ("qwen2", "layers.1.mlp.w3", "model.layers.1.mlp.up_proj"),
        ("llama", "output", "lm_head"),
        ("qwen3", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"),
    ],
)
def test_hf_names(family: str, path: str, name: str, folders: dict[str, Path], references: dict) -> None:
    assert from_pretrained(folders[family]).hf_name(path) == name
    references[family].get_submodule(name)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_unknown_path_is_refused(family: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"layers\.0\.nothing"):
        from_pretrained(folders[family]).hf_name("layers.0.nothing")


@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_folded_into_both_models_agree(
    family: str, folders: dict[str, Path], references: dict[str, PreTrainedModel]
) -> None:
    """What an adapter's B A adds here, its rows reordered by export_rows, adds the same in transformers."""
    base, model = from_pretrained(folders[family]), copy.deepcopy(references[family])
    for path, module in base.module.named_modules():
        if not _is_linear(module) or path == base.head_path:
            continue
        a, b = torch.randn(4, module.in_features), torch.randn(module.out_features, 4)
        rows = base.export_rows(path)
        module.weight.data += 0.02 * b @ a
        model.get_submodule(base.hf_name(path)).weight.data += 0.02 * (b if rows is None else b[rows]) @ a
    with torch.no_grad():
        ours = base.logits(_hidden(base, RAGGED))
        theirs = _reference_logits(model, _tokens(RAGGED), RAGGED)
        before = _reference_logits(references[family], _tokens(RAGGED), RAGGED)
    assert _relative(ours, theirs) < 1e-5
    assert _relative(before, theirs) > 0.1


def test_only_llama_reorders_rotary_rows(folders: dict[str, Path]) -> None:
    llama = from_pretrained(folders["llama"])
    assert llama.export_rows("layers.0.attn.k_proj").tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert llama.export_rows("layers.0.attn.v_proj") is None
    assert from_pretrained(folders["qwen2"]).export_rows("layers.0.attn.q_proj") is None
    assert from_pretrained(folders["qwen3"]).export_rows("model.layers.0.self_attn.q_proj") is None


def test_too_long_for_the_model(folders: dict[str, Path]) -> None:
    base = from_pretrained(folders["llama"])
    with pytest.raises(ModelError, match="513 tokens exceeds the 512 positions"):
        _hidden(base, [2, 513])


def test_random_weights_from_a_config() -> None:
    config = {**tiny.CONFIGS["qwen2"].to_dict(), "architectures": ["Qwen2ForCausalLM"]}
    first, second, third = (from_config(config, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(_hidden(first, [3, 4]), _hidden(second, [3, 4]))
    assert not torch.equal(_hidden(first, [3, 4]), _hidden(third, [3, 4]))
    assert _hidden(first, [3, 4]).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_on_a_gpu(family: str, folders: dict[str, Path]) -> None:
    """bf16 on the GPU, compiled per layer, against fp32 on the host: as near as bf16 on the host is."""
    host = from_pretrained(folders[family])
    base = from_pretrained(folders[family], dtype="bf16", device="cuda", activation_checkpointing=True)
    base.compile_layers(fullgraph=True)
    for lengths in (RAGGED, [64, 3]):
        hidden = _hidden(base, lengths)
        assert _relative(hidden.float().cpu(), _hidden(host, lengths)) < 0.05
        hidden.float().sum().backward()
