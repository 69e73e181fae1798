"""Model shapes from config.json."""

from __future__ import annotations

import subprocess
import sys

import pytest

from plora.models import LinearSpec, ModelError, ModelSpec
from plora.models.spec import rope_settings, sliding_window

# From the model cards and the checkpoints' safetensors indices.
PUBLISHED_PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-32B-Instruct": 32_763_876_352,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
}
MINIMAL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 10,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED_PARAMETERS.items())
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    spec = ModelSpec.preset(name)
    assert spec.n_params == parameters
    assert spec.name == name.split("/")[1]


def test_linears_of_a_qwen_layer() -> None:
    spec = ModelSpec.preset("Qwen/Qwen2.5-7B")
    assert spec.linears == (
        LinearSpec("q_proj", 3584, 3584, "column", True),
        LinearSpec("k_proj", 3584, 512, "column", True),
        LinearSpec("v_proj", 3584, 512, "column", True),
        LinearSpec("o_proj", 3584, 3584, "row"),
        LinearSpec("gate_proj", 3584, 18944, "column"),
        LinearSpec("up_proj", 3584, 18944, "column"),
        LinearSpec("down_proj", 18944, 3584, "row"),
    )


def test_reading_a_spec_imports_no_torch() -> None:
    code = (
        "import sys; from plora.models import ModelSpec; ModelSpec.preset('Qwen/Qwen2.5-7B');"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_config_leaves_out_has_the_families_defaults() -> None:
    spec = ModelSpec.from_config(MINIMAL)
    assert (spec.num_kv_heads, spec.head_dim, spec.ffn_dim, spec.tied_embeddings) == (4, 16, 256, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size must be a positive whole number, got None"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers .* got '3'"),
        ({"vocab_size": 0}, "vocab_size .* got 0"),
        ({"architectures": []}, "no 'architectures'"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
    ],
)
def test_a_broken_config_names_the_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSpec.from_config({**MINIMAL, **change})


def test_an_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ModelError, match=r"Qwen/Qwen2\.5-7B-Instruct"):
        ModelSpec.preset("Qwen/Qwen9-7B")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e6}),
        ({}, {"rope_type": "default", "rope_theta": 1e4}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
        ),
    ],
)
def test_rope_settings_of_old_and_new_files(config: dict[str, object], expected: dict[str, object]) -> None:
    assert rope_settings(config) == expected


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"sliding_window": None}, None),
        ({"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]}, 512),
        ({"sliding_window": 512, "layer_types": ["full_attention"]}, None),
        ({"layer_types": ["chunked_attention"], "attention_chunk_size": 64}, 64),
    ],
)
def test_sliding_window(config: dict[str, object], window: int | None) -> None:
    assert sliding_window(config) == window
