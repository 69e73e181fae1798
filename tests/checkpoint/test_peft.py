"""Exports against peft itself and against the formula."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from plora.checkpoint.peft import export_adapter, import_adapter, target_modules, to_base_layout
from plora.modules.config import AdapterConfig

SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=FAMILIES)
def base_folder(request, tmp_path_factory):
    kind, config = FAMILIES[request.param]
    torch.manual_seed(0)
    model = kind(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # Hugging Face starts biases at zero
            torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return kind, folder


def load_base(base_folder):
    kind, folder = base_folder
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def linears(model, leaves):
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in leaves}


def random_factors(model, leaves, rank, seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.3  # noqa: E731
    return {
        name: (draw(rank, linear.in_features), draw(linear.out_features, rank))
        for name, linear in linears(model, leaves).items()
    }


def merged_logits(base_folder, factors, scale, tokens):
    """The definition: each adapted weight becomes W + scale B A."""
    model = load_base(base_folder)
    for name, (a, b) in factors.items():
        model.get_submodule(name).weight.data += scale * b @ a
    return model(tokens).logits


TOKENS = torch.arange(40).view(2, 20) % 97


@pytest.mark.parametrize(
    "config",
    [
        AdapterConfig(rank=4, alpha=6.0),
        AdapterConfig(rank=4, alpha=6.0, rslora=True, dropout=0.1),
        AdapterConfig(rank=3, alpha=7.5, target_modules=("q_proj", "down_proj")),
        AdapterConfig(rank=1, alpha=2.0, target_modules=("k_proj",)),
    ],
    ids=["all", "rslora", "two", "one"],
)
def test_peft_computes_our_formula(base_folder, tmp_path, config):
    leaves = ALL if config.target_modules == "all-linear" else config.target_modules
    model = load_base(base_folder)
    factors = random_factors(model, leaves, config.rank)
    # Our base model may name modules otherwise and keep rotary rows in another order.
    ours, rows = {}, {}
    for number, (name, (a, b)) in enumerate(factors.items()):
        rows[f"m{number}"] = torch.randperm(len(b)) if name.endswith(("q_proj", "k_proj")) else None
        permutation = rows[f"m{number}"]
        ours[f"m{number}"] = (a, b if permutation is None else b[torch.argsort(permutation)])
    names = dict(zip(ours, factors, strict=True))
    directory = export_adapter(
        tmp_path / "adapter", ours, config, names, rows.get, str(base_folder[1]), None, dtype="fp32"
    )
    loaded = peft.PeftModel.from_pretrained(model, directory).eval()
    with torch.no_grad():
        expected = merged_logits(base_folder, factors, config.scale, TOKENS)
        plain = load_base(base_folder)(TOKENS).logits
        got = loaded(TOKENS).logits
    assert (got - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-2
    assert set(loaded.peft_config["default"].target_modules) == set(leaves)
    imported_config, imported = import_adapter(directory)
    assert (imported_config.scale, imported_config.rank, imported_config.dropout) == (
        config.scale,
        config.rank,
        config.dropout,
    )
    back = to_base_layout(imported, ours, names, rows.get)
    for path, pair in ours.items():
        assert all(torch.equal(x, y) for x, y in zip(back[path], pair, strict=True)), path


def test_bf16_by_default_with_tokenizer_and_template(base_folder, tmp_path):
    model = load_base(base_folder)
    config = AdapterConfig(rank=2, alpha=4.0)
    factors = random_factors(model, ALL, 2)
    bare = Tokenizer(models.WordLevel({"hello": 0, "<unk>": 1}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", chat_template="{{ messages[0] }}")
    directory = export_adapter(
        tmp_path / "adapter", factors, config, str, lambda path: None, "org/base", "abc123", tokenizer=tokenizer
    )
    saved = json.loads((directory / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"], saved["inference_mode"]) == (
        "org/base",
        "abc123",
        True,
    )
    assert (saved["task_type"], saved["bias"], saved["lora_alpha"]) == ("CAUSAL_LM", "none", 4)
    assert AutoTokenizer.from_pretrained(directory).chat_template == "{{ messages[0] }}"
    assert {tensor.dtype for tensor in load_file(directory / "adapter_model.safetensors").values()} == {torch.bfloat16}
    loaded = peft.PeftModel.from_pretrained(model, directory).eval()
    rounded = {path: (a.bfloat16().float(), b.bfloat16().float()) for path, (a, b) in factors.items()}
    with torch.no_grad():
        assert (loaded(TOKENS).logits - merged_logits(base_folder, rounded, config.scale, TOKENS)).abs().max() < 1e-5


def test_full_paths_where_a_name_would_match_more(base_folder, tmp_path):
    model = load_base(base_folder)
    trained = {k: v for k, v in random_factors(model, ("q_proj", "o_proj"), 2).items() if "0.self_attn.q" not in k}
    config = AdapterConfig(rank=2, alpha=2.0, target_modules=("q_proj", "o_proj"))
    everything = [name for name, _ in model.named_modules()]
    directory = export_adapter(
        tmp_path / "a", trained, config, str, lambda p: None, "b", None, "fp32", base_modules=everything
    )
    targets = json.loads((directory / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["model.layers.1.self_attn.q_proj", "o_proj"]
    loaded = peft.PeftModel.from_pretrained(model, directory).eval()
    assert sum("lora_A" in name and name.endswith("weight") for name, _ in loaded.named_parameters()) == 3
    with torch.no_grad():
        expected = merged_logits(base_folder, trained, config.scale, TOKENS)
        assert (loaded(TOKENS).logits - expected).abs().max() < 1e-5


def test_target_modules_match_whole_components():
    trained = ["h.0.proj", "h.1.proj"]
    assert target_modules(trained, [*trained, "h.0.out_proj"]) == ["proj"]
    assert target_modules(trained, [*trained, "vision.proj"]) == trained
    assert target_modules(trained, None) == ["proj"]


def test_export_replaces_and_refuses_unknown_dtype(tmp_path):
    factors = {"x.q_proj": (torch.randn(2, 4), torch.randn(4, 2))}
    arguments = (AdapterConfig(rank=2), str, lambda path: None, "base", None)
    with pytest.raises(ValueError, match="fp8"):
        export_adapter(tmp_path / "a", factors, *arguments, dtype="fp8")
    export_adapter(tmp_path / "a", factors, *arguments)
    second = {"x.q_proj": (torch.ones(2, 4), torch.ones(4, 2))}
    export_adapter(tmp_path / "a", second, *arguments)
    assert torch.equal(import_adapter(tmp_path / "a")[1]["x.q_proj"][0], torch.ones(2, 4))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def peft_made(base_folder, directory, **settings):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(load_base(base_folder), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_reads_what_peft_writes(base_folder, tmp_path, use_rslora):
    model = peft_made(base_folder, tmp_path, use_rslora=use_rslora, lora_dropout=0.05)
    config, factors = import_adapter(tmp_path)
    assert config == AdapterConfig(
        rank=4, alpha=8.0, dropout=0.05, target_modules=("q_proj", "v_proj"), rslora=use_rslora
    )
    with torch.no_grad():
        assert (merged_logits(base_folder, factors, config.scale, TOKENS) - model(TOKENS).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
def test_refuses_more_than_plain_lora(base_folder, tmp_path, settings, named):
    if base_folder[0] is LlamaForCausalLM and settings.get("bias"):
        pytest.skip("this Llama has no biases for peft to train")
    peft_made(base_folder, tmp_path, **settings)
    with pytest.raises(ValueError, match="cannot read the adapter") as error:
        import_adapter(tmp_path)
    assert named in str(error.value)


def test_names_what_is_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        import_adapter(tmp_path)
    factors = {"x.q_proj": (torch.randn(2, 4), torch.randn(4, 2))}
    directory = export_adapter(tmp_path / "a", factors, AdapterConfig(rank=2), str, lambda path: None, "base", None)
    settings = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps({**settings, "r": 5}))
    with pytest.raises(ValueError, match="r=5"):
        import_adapter(directory)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        import_adapter(directory)
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*corrupt or truncated"):
        import_adapter(directory)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        import_adapter(directory)


def test_an_adapter_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"'y\.q_proj'"):
        to_base_layout({"y.q_proj": (torch.zeros(1, 2), torch.zeros(2, 1))}, ["x.q_proj"], str, lambda path: None)
