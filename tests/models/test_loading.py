"""Loading checkpoints: what is read, what is refused, and with which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, Gemma2Config, GPT2Config, MistralConfig, PreTrainedModel

from plora.models import ModelError, PackedSequences, check, from_config, from_pretrained, inspect
from plora.models.torchtune_compat import unsupported
from tests.models import tiny


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny checkpoint, to be broken."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _logits(base: Any) -> torch.Tensor:
    sequences = PackedSequences.from_lengths([4, 7])
    with torch.no_grad():
        return base.logits(base.hidden_states(torch.arange(11), sequences.positions(), sequences))


def test_inspect_reads_no_weights(copied: Callable[[str], Path]) -> None:
    for family in ("llama", "qwen3"):
        folder = copied(family)
        expected = from_pretrained(folder).spec
        (folder / "model.safetensors").unlink()
        assert inspect(folder) == expected
        assert expected.source == str(folder)


def test_sharded_checkpoints(folders: dict[str, Path], references: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    for family in ("qwen2_untied", "qwen3"):
        references[family].save_pretrained(tmp_path / family, max_shard_size="40KB")
        assert len(list((tmp_path / family).glob("*.safetensors"))) > 2
        ours, theirs = (_logits(from_pretrained(folder)) for folder in (tmp_path / family, folders[family]))
        assert torch.equal(ours, theirs)


def test_a_missing_shard_is_named(references: dict[str, PreTrainedModel], tmp_path: Path) -> None:
    references["qwen2_untied"].save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        check(tmp_path)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _cut_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def _garbage(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"!" + content[9:])


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"model\.safetensors is truncated"),
        (_cut_header, r"model\.safetensors is truncated"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model\.safetensors is truncated"),
        (_garbage, r"model\.safetensors has a corrupt safetensors header"),
        (_only_pickles, "save_pretrained"),
        (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: _edit_config(folder, quantization_config={"quant_method": "awq"}), "quantized with awq"),
    ],
)
def test_damaged_checkpoints(
    family: str, damage: Callable[[Path], Any], message: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(family)
    damage(folder)
    for attempt in (from_pretrained, check):
        with pytest.raises(ModelError, match=message):
            attempt(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_weights_that_do_not_match_the_config(family: str, copied: Callable[[str], Path]) -> None:
    folder = copied(family)
    _edit_config(folder, intermediate_size=96)
    name = r"model\.layers\.0\.mlp\.(down|gate|up)_proj\.weight"
    with pytest.raises(ModelError, match=rf"{name} is \[(80, 48|48, 80)\].*\[(96, 48|48, 96)\] by config\.json"):
        from_pretrained(folder)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_missing_and_unknown_tensors(family: str, copied: Callable[[str], Path]) -> None:
    folder = copied(family)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.extra.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")

    _edit_weights(folder, rename)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight.* is missing") as caught:
        from_pretrained(folder)
    assert "model.layers.1.mlp.extra.weight" in str(caught.value)


def test_check_finds_a_mismatch_without_loading(copied: Callable[[str], Path]) -> None:
    folder = copied("qwen2")
    assert check(folder).num_layers == 3
    _edit_config(folder, hidden_size=96)
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight is \[97, 48\]"):
        check(folder)


def test_a_stored_copy_of_a_tied_head_is_ignored(copied: Callable[[str], Path]) -> None:
    folder = copied("qwen2")
    expected = _logits(from_pretrained(folder))
    _edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(97, 48)}))
    assert torch.equal(_logits(from_pretrained(folder)), expected)


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("llama", {}, None),
        ("qwen2", {}, None),
        ("qwen3", {}, "Qwen3ForCausalLM"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"head_dim": 16}, "head_dim"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'yarn'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial rotary"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "layer_types": None}, "sliding windows"),
        ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope type 'llama3'"),
    ],
)
def test_what_torchtune_cannot_express(family: str, change: dict[str, Any], reason: str | None, folders: dict) -> None:
    config = {**json.loads((folders[family] / "config.json").read_text()), **change}
    found = unsupported(config)
    assert found is None if reason is None else reason in (found or "")


_SIZES = {key: value for key, value in tiny._SIZES.items() if value is not None}


def test_softcapped_attention_is_refused(tmp_path: Path) -> None:
    tiny.reference(Gemma2Config(**_SIZES, head_dim=8)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="softcap"):
        from_pretrained(tmp_path)


def test_a_model_that_does_not_pass_the_proof_is_refused(tmp_path: Path) -> None:
    """Bloom adds position biases to its scores in a place where packed attention does not see them."""
    config = BloomConfig(vocab_size=97, hidden_size=48, n_layer=2, n_head=6, bos_token_id=0, eos_token_id=0)
    tiny.reference(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="BloomForCausalLM cannot be packed exactly"):
        from_pretrained(tmp_path)


def test_layers_without_linears_are_refused(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=6, bos_token_id=0, eos_token_id=0)
    tiny.reference(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no nn\.Linear"):
        inspect(tmp_path)


def test_an_unknown_architecture_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    _edit_config(folder, architectures=["SecretForCausalLM"], model_type="secret")
    with pytest.raises(ModelError, match=r"SecretForCausalLM \(model_type 'secret'\)"):
        inspect(folder)


def test_sliding_windows_are_exact_within_the_window_and_refused_beyond(tmp_path: Path) -> None:
    model = tiny.reference(MistralConfig(**_SIZES, sliding_window=8))
    model.save_pretrained(tmp_path)
    base = from_pretrained(tmp_path)
    with torch.no_grad():
        alone = torch.cat([model(part[None]).logits[0] for part in torch.arange(11).split([4, 7])])
    torch.testing.assert_close(_logits(base), alone, rtol=1e-4, atol=1e-4)
    sequences = PackedSequences.from_lengths([9])
    with pytest.raises(ModelError, match="window of 8 tokens"):
        base.hidden_states(torch.arange(9), sequences.positions(), sequences)


# Widths that fill NF4's blocks; large enough that quantization errors average out.
_NF4_SIZES = {**_SIZES, "hidden_size": 192, "intermediate_size": 256}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_nf4_computes_with_its_rounded_weights(family: str, tmp_path: Path) -> None:
    """Rounding to 16 levels costs about 9% of a normal weight's norm (QLoRA, table 2); nothing else may differ."""
    AutoModelForCausalLM.from_config(type(tiny.CONFIGS[family])(**_NF4_SIZES)).save_pretrained(tmp_path)
    exact, base = from_pretrained(tmp_path), from_pretrained(tmp_path, quantize="nf4")
    layers = {path for path, m in base.module.named_modules() if isinstance(m, nn.Linear)} - {base.head_path}
    assert len(layers) == 3 * 7
    for path in layers:
        ours, theirs = base.module.get_submodule(path).weight, exact.module.get_submodule(path).weight
        assert type(ours.data).__name__ == "NF4Tensor"
        rounded = ours.get_original_weight()
        assert 0.05 < (rounded - theirs).norm() / theirs.norm() < 0.12
        theirs.data.copy_(rounded)
    torch.testing.assert_close(_logits(base), _logits(exact), rtol=1e-4, atol=1e-4)


def test_nf4_as_a_dtype_computes_in_bf16(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(type(tiny.CONFIGS["llama"])(**_NF4_SIZES)).save_pretrained(tmp_path)
    base, wide = from_pretrained(tmp_path, dtype="nf4"), from_pretrained(tmp_path, quantize="nf4")
    assert (base.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    ours, theirs = _logits(base), _logits(wide)
    assert ours.dtype == torch.bfloat16
    # Weights that bf16 rounds first can fall to the neighbouring level.
    assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_gradients_pass_through_nf4() -> None:
    config = {**tiny.CONFIGS["llama"].to_dict(), "architectures": ["LlamaForCausalLM"], "hidden_size": 192}
    base = from_config({**config, "head_dim": 32, "intermediate_size": 256}, quantize="nf4")
    embedded: list[torch.Tensor] = []
    base.embedding.register_forward_hook(lambda m, i, out: embedded.append(out))
    sequences = PackedSequences.from_lengths([4, 7])
    hidden = base.hidden_states(torch.arange(11), sequences.positions(), sequences)
    (grad,) = torch.autograd.grad((hidden * torch.arange(192)).sum(), embedded)
    assert grad.isfinite().all()
    assert (grad != 0).any(-1).all()


@pytest.mark.parametrize(
    ("options", "message"), [({"dtype": "fp16"}, "bf16, fp32 or nf4, got 'fp16'"), ({"quantize": "int8"}, "got 'int8'")]
)
def test_unknown_precision(options: dict[str, Any], message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=message):
        from_pretrained(folders["llama"], **options)


@pytest.mark.parametrize(("setting", "active"), [(True, True), (False, False), (1, 1), ("auto", False)])
def test_activation_checkpointing_setting(setting: Any, active: bool, folders: dict[str, Path]) -> None:
    assert from_pretrained(folders["llama"], activation_checkpointing=setting).activation_checkpointing is active
