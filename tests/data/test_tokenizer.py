"""Token ids equal the template's, and labels are the answer and its end of turn."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from plora.data import tokenizer as tok
from plora.data.types import IGNORE_INDEX, Example

ANSWERS = ["72", "72\n", "\n\n72", "  72  ", "She sold\n\n#### 72", "<72>"]


def labelled(tokenizer: tok.ChatTokenizer, example: Example) -> str:
    return tokenizer.decode(example.labels[example.labels != IGNORE_INDEX], skip_special_tokens=False)


def all_ids(example: Example) -> np.ndarray:
    return np.append(example.inputs, example.labels[-1])


def reference(tokenizer: tok.ChatTokenizer, messages: list[dict[str, str]]) -> list[int]:
    return list(tokenizer.hf.apply_chat_template(messages, tokenize=True, return_dict=False))


def pair(prompt: str, answer: str, system: str | None = None) -> list[dict[str, str]]:
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("kind", ["qwen2_5", "llama3", "eos_is_pad", "thinking"])
@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("system", [None, "Be short."])
def test_ids_are_those_of_the_template(folders: dict[str, Path], kind: str, answer: str, system: str | None) -> None:
    tokenizer = tok.load(str(folders[kind]))
    encoded = tokenizer.encode("How many clips?", answer, system_prompt=system)
    want = reference(tokenizer, pair("How many clips?", answer, system))
    assert encoded.ids.tolist() == want
    assert encoded.example is not None
    kept = all_ids(encoded.example)
    assert kept.tolist() == want[: len(kept)]
    assert tokenizer.decode(want[len(kept) :], skip_special_tokens=False).strip() == ""


def test_prompt_is_the_template_s_generation_prompt(qwen: tok.ChatTokenizer, llama: tok.ChatTokenizer) -> None:
    for tokenizer in (qwen, llama):
        example = tokenizer.encode("How many?", "72").example
        want = tokenizer.hf.apply_chat_template(
            pair("How many?", "72")[:1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert example.prompt.tolist() == list(want)
        assert example.inputs[: len(want)].tolist() == list(want)


def test_templates_are_the_published_ones(qwen: tok.ChatTokenizer, llama: tok.ChatTokenizer) -> None:
    text = qwen.decode(qwen.encode("Hi", "yes").ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    text = llama.decode(llama.encode(" Hi ", " yes ").ids, skip_special_tokens=False)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
    )


@pytest.mark.parametrize("max_seq_len", [None, 200])
@pytest.mark.parametrize("too_long", tok.TOO_LONG)
@pytest.mark.parametrize(
    ("kind", "end"), [("qwen2_5", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("eos_is_pad", "<|im_end|>")]
)
def test_labels_are_answer_and_end_of_turn(
    folders: dict[str, Path], kind: str, end: str, max_seq_len: int | None, too_long: str
) -> None:
    tokenizer = tok.load(str(folders[kind]), max_seq_len=max_seq_len, too_long=too_long)
    example = tokenizer.encode("How many clips?", "She sold\n#### 72").example
    assert labelled(tokenizer, example) == f"She sold\n#### 72{end}"
    assert len(example.prompt) + example.n_labels == len(example.inputs) + 1
    assert example.labels[: len(example.prompt) - 1].tolist() == [IGNORE_INDEX] * (len(example.prompt) - 1)
    assert tokenizer.stop_ids.count(tokenizer.hf.convert_tokens_to_ids(end)) == 1


def test_exact_limit_keeps_the_end_of_turn(qwen: tok.ChatTokenizer, folders: dict[str, Path]) -> None:
    length = len(qwen.encode("How many?", "72").example) + 1
    exact = tok.load(str(folders["qwen2_5"]), max_seq_len=length)
    assert labelled(exact, exact.encode("How many?", "72").example) == "72<|im_end|>"
    below = tok.load(str(folders["qwen2_5"]), max_seq_len=length - 1)
    assert below.encode("How many?", "72").outcome == "too_long"


def test_truncation_cuts_the_answer_s_end(qwen: tok.ChatTokenizer, folders: dict[str, Path]) -> None:
    whole = qwen.encode("How many?", "She sold 72 clips").example
    limit = len(whole.prompt) + 2
    cut = tok.load(str(folders["qwen2_5"]), max_seq_len=limit, too_long="truncate")
    encoded = cut.encode("How many?", "She sold 72 clips")
    assert encoded.outcome == "truncated"
    assert all_ids(encoded.example).tolist() == all_ids(whole)[:limit].tolist()
    assert encoded.example.n_labels == 2
    nothing_left = tok.load(str(folders["qwen2_5"]), max_seq_len=len(whole.prompt), too_long="truncate")
    assert nothing_left.encode("How many?", "She sold 72 clips").outcome == "no_labels"


def test_too_long_error_names_the_length(folders: dict[str, Path]) -> None:
    tokenizer = tok.load(str(folders["qwen2_5"]), max_seq_len=5, too_long="error")
    with pytest.raises(ValueError, match=r"has \d+ tokens, more than max_seq_len 5"):
        tokenizer.encode("How many?", "72")


def test_empty_answer_has_no_labels(qwen: tok.ChatTokenizer) -> None:
    assert qwen.encode("How many?", " \n").outcome == "no_labels"


def test_answer_that_merges_with_the_header(qwen: tok.ChatTokenizer) -> None:
    """Header and answer meet in one token of newlines: it is not labelled, and the prompt stays the template's."""
    example = qwen.encode("How many?", "\n72").example
    prompt = qwen.encode("How many?", "72").example.prompt
    assert example.prompt.tolist() == prompt.tolist()
    assert example.inputs[: len(prompt)].tolist() != prompt.tolist(), "the case this test is about did not occur"
    assert labelled(qwen, example) == "72<|im_end|>"


def test_thinking_template_keeps_the_empty_thought_in_the_header(folders: dict[str, Path]) -> None:
    tokenizer = tok.load(str(folders["thinking"]))
    example = tokenizer.encode("How many?", "72").example
    assert labelled(tokenizer, example) == "72<|im_end|>"
    assert tokenizer.decode(example.prompt, skip_special_tokens=False).endswith("<think>\n\n</think>\n\n")


def test_template_with_another_generation_header_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[bot]<think>{% endif %}"
    )
    tokenizer = tok.load(str(folders["qwen2_5"]), chat_template=str(path))
    with pytest.raises(ValueError, match="another header"):
        tokenizer.encode("How many?", "72")


def test_template_that_is_no_jinja(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in")
    with pytest.raises(ValueError, match=r"cannot be used \(TemplateSyntaxError.*set tokenizer.chat_template"):
        tok.load(str(folders["qwen2_5"]), chat_template=str(path))


def test_half_a_surrogate_pair_is_named(qwen: tok.ChatTokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        qwen.encode("How \ud83d many?", "72")


def test_template_that_refuses_a_role(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + "{{ messages[-1].content }}"
    )
    tokenizer = tok.load(str(folders["qwen2_5"]), chat_template=str(path))
    with pytest.raises(ValueError, match=r"refuses example 0 \(no system role\)"):
        tokenizer.encode("How many?", "72", system_prompt="x")


@pytest.mark.parametrize("kind", ["qwen2_5", "llama3", "thinking"])
def test_conversations_train_on_all_or_last(folders: dict[str, Path], kind: str) -> None:
    tokenizer = tok.load(str(folders[kind]))
    conversation = [*pair("One?", "yes"), *pair("Two?", "no")]
    end = tokenizer.hf.convert_ids_to_tokens(tokenizer.end_of_turn_id)
    both = tokenizer.encode_all([conversation])[0].example
    assert labelled(tokenizer, both) == f"yes{end}no{end}"
    last = tokenizer.encode_all([conversation], train_on="last")[0].example
    assert labelled(tokenizer, last) == f"no{end}"
    assert both.inputs.tolist() == last.inputs.tolist()
    assert both.prompt.tolist() == both.inputs[: len(both.prompt)].tolist()


def test_candidates_replace_the_answer(qwen: tok.ChatTokenizer) -> None:
    example = qwen.encode("How many?", "yes", system_prompt="Short.").example
    yes, no = qwen.candidates(example, ["yes", "no"])
    assert all_ids(yes).tolist() == all_ids(example).tolist()
    assert all_ids(no).tolist() == all_ids(qwen.encode("How many?", "no", system_prompt="Short.").example).tolist()


def test_plain_text(folders: dict[str, Path]) -> None:
    tokenizer = tok.load(str(folders["llama3_base"]), chat_template="none")
    encoded = tokenizer.encode("Clips: ", "72", system_prompt="Count.")
    text = tokenizer.decode(encoded.ids, skip_special_tokens=False)
    assert text.removeprefix("<|begin_of_text|>") == "Count.\n\nClips: 72<|end_of_text|>"
    assert labelled(tokenizer, encoded.example) == " 72<|end_of_text|>"
    assert tokenizer.stop_ids == (tokenizer.hf.eos_token_id,)
    with pytest.raises(ValueError, match="one prompt and one answer"):
        tokenizer.encode_all([[*pair("a", "b"), *pair("c", "d")]])


def test_base_model_without_template_says_what_to_do(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="chat_template to none"):
        tok.load(str(folders["llama3_base"]))


def test_template_on_a_base_model_warns(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}<|start_header_id|>{{ m.content }}<|eot_id|>{% endfor %}")
    with caplog.at_level(logging.WARNING):
        tok.load(str(folders["qwen2_5"]))
        tok.load(str(folders["eos_is_pad"]))
        tok.load(str(folders["qwen2_5_base"]), chat_template="none")
    assert "base model" not in caplog.text
    for kind, template in (("qwen2_5_base", "checkpoint"), ("llama3_base", str(path))):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tok.load(str(folders[kind]), chat_template=template)
        assert "looks like a base model" in caplog.text


def test_stop_ids_take_in_the_generation_config(qwen: tok.ChatTokenizer) -> None:
    assert set(qwen.stop_ids) == set(qwen.hf.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


def test_save_keeps_the_template_in_use(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    tok.load(str(folders["qwen2_5"]), chat_template=str(path)).save(tmp_path / "saved")
    again = tok.load(str(tmp_path / "saved"))
    assert again.hf.chat_template == path.read_text()


@pytest.mark.parametrize(
    ("section", "want"),
    [
        ({"source": "x", "max_seq_length": 5}, "did you mean 'max_seq_len'"),
        ({"source": "x", "max_seq_len": 0}, "max_seq_len: must be a whole number of at least 2"),
        ({"source": "x", "too_long": "cut"}, "too_long: must be one of drop, truncate, error, got 'cut'"),
        ({"source": "x", "chat_template": "no/such.jinja"}, "'no/such.jinja' is neither"),
        ({}, "source: give a folder"),
    ],
)
def test_mistakes(section: dict[str, object], want: str) -> None:
    found = tok.check(section)
    assert len(found) == 1
    assert want in found[0]
    assert found[0].startswith("tokenizer.")


def test_nothing_to_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        tok.load(str(tmp_path))
    monkeypatch.setattr(tok.hub, "unreachable", lambda: "the hub cannot be reached.")
    with pytest.raises(ValueError, match=r"from 'owner/none': the hub cannot be reached\."):
        tok.load("owner/none")
