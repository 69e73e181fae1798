from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from plora.config import ConfigError, check_run, check_targets, load, required_bytes
from plora.config.schema import ExportConfig
from plora.models.spec import ModelSpec
from plora.modules.config import AdapterConfig
from plora.search.trial import Trial

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SPEC = ModelSpec.from_config(MODEL, source="tiny")


def trial(number: int, rank: int = 8, targets: str | tuple[str, ...] = "all-linear") -> Trial:
    return Trial(number, f"t{number:03d}", AdapterConfig(rank=rank, target_modules=targets))


def test_targets_are_checked_against_the_model() -> None:
    trials = [trial(n, targets=("q_proj", "fc1")) for n in range(5)] + [trial(5, targets=("lm_head",))]
    fc1, head = check_targets(trials, SPEC)
    assert "no linear layer named 'fc1'" in fc1
    assert "down_proj" in fc1  # the names there are
    assert "used by t000, t001, t002 and 2 more" in fc1
    assert "output head" in head
    assert check_targets([trial(0), trial(1, targets=("q_proj", "down_proj"))], SPEC) == []


def test_a_rank_above_a_layers_width_is_a_warning(raw: dict[str, Any]) -> None:
    errors, warnings = check_run(load(raw), [trial(0, rank=32), trial(1, rank=33, targets=("q_proj", "v_proj"))], SPEC)
    assert errors == []
    (warning,) = warnings
    assert "rank 33 is above the width 32 of v_proj" in warning
    assert "used by t001" in warning


def test_required_bytes_by_hand() -> None:
    trials = [trial(0, rank=4, targets=("q_proj",)), trial(1, rank=8, targets=("v_proj",))]
    q_params, v_params = 2 * 4 * (64 + 64), 2 * 8 * (64 + 32)
    states = 4 * (q_params + v_params)
    tokenizer = 80 * 100
    assert (
        required_bytes(trials, SPEC, ExportConfig("all", "bf16")) == states + 2 * (q_params + v_params) + 2 * tokenizer
    )
    assert required_bytes(trials, SPEC, ExportConfig(1, "fp32")) == states + 4 * max(q_params, v_params) + tokenizer
    assert required_bytes(trials, SPEC, ExportConfig(0, "fp32")) == states


def test_a_full_disk_is_an_error_with_the_numbers(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(raw)
    needed = required_bytes(config.trials, SPEC, config.export)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed, 0, needed))
    assert check_run(config, config.trials, SPEC) == ([], [])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(needed, 0, needed - 1))
    (error,) = check_run(config, config.trials, SPEC)[0]
    assert "output_dir" in error
    assert "free" in error
    assert "export.keep" in error


def test_sequences_longer_than_the_models_positions(raw: dict[str, Any]) -> None:
    raw["tokenizer"] = {"max_seq_len": 4096}
    config = load(raw)
    (error,) = check_run(config, config.trials, SPEC)[0]
    assert "max_seq_len = 4096" in error
    assert "lower it to 2048" in error


def test_a_default_in_place_of_a_wrong_value_is_no_mistake(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "max_position_embeddings": 256}))
    raw["model"] = {"source": str(tmp_path)}
    for length, advice in ((1, "must be a whole number at least 2"), (512, "lower it to 256")):
        with pytest.raises(ConfigError, match=advice) as caught:
            load({**raw, "tokenizer": {"max_seq_len": length}})
        assert len(caught.value.mistakes) == 1


def test_more_layers_recomputed_than_there_are(raw: dict[str, Any]) -> None:
    raw["model"] = {**raw["model"], "activation_checkpointing": 3}
    config = load(raw)
    (error,) = check_run(config, config.trials, SPEC)[0]
    assert "model.activation_checkpointing = 3: tiny has 2 layers" in error
    config = load(raw, {"model.activation_checkpointing": 2})
    assert config.model.activation_checkpointing == 2
    assert check_run(config, config.trials, SPEC) == ([], [])


def test_every_data_option_that_is_searched_is_checked(raw: dict[str, Any]) -> None:
    raw["search"] = {"trials": [{"dataset.max_examples": 5}, {"dataset.max_examples": 0}, {"dataset.split": "dev"}]}
    config = load(raw)
    errors, _ = check_run(config, config.trials, SPEC)
    assert len(errors) == 2
    assert "dataset.max_examples" in errors[0]
    assert "no split 'dev'" in errors[1]


def test_a_directory_that_cannot_be_made(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, want in (("x" * 300, "File name too long"), ("link", "is a link to"), ("link/run", "is a link to")):
        with pytest.raises(ConfigError, match=want):
            load({**raw, "output_dir": str(tmp_path / name)})
