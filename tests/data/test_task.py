"""From a section of the configuration to examples, and every mistake on the way."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import pytest

from plora.data import check, hub, load_task
from plora.data import tokenizer as tok
from plora.data.types import IGNORE_INDEX, Example

SEED = 17


def section(path: Path, **more: Any) -> dict[str, Any]:
    return {
        "_component_": "torchtune.datasets.instruct_dataset",
        "source": str(path),
        "column_map": {"input": "question", "output": "answer"},
        **more,
    }


def numbers(examples: list[Example]) -> list[int]:
    return [int(e.answer) for e in examples]


def labelled(tokenizer: tok.ChatTokenizer, example: Example) -> str:
    return tokenizer.decode(example.labels[example.labels != IGNORE_INDEX])


def test_prompt_and_answer(rows_file: Path, qwen: tok.ChatTokenizer) -> None:
    task, _ = load_task("t", section(rows_file, system_prompt="Count."), None, None, qwen, SEED)
    example = task.train[0]
    i = example.answer
    text = qwen.decode(example.inputs, skip_special_tokens=False)
    assert text == (
        f"<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nWhat is {i}?<|im_end|>\n<|im_start|>assistant\n{i}"
    )
    assert labelled(qwen, example) == i
    assert example.fields["label"] == int(i) % 2


def test_prompt_template(rows_file: Path, qwen: tok.ChatTokenizer) -> None:
    cfg = section(rows_file, prompt_template="Q: {question} {{as is}} ({label}) {input}", max_examples=1)
    task, _ = load_task("t", cfg, None, None, qwen, SEED)
    i = int(task.train[0].answer)
    assert task.train[0].messages[-1]["content"] == f"Q: What is {i}? {{as is}} ({i % 2}) What is {i}?"


@pytest.mark.parametrize("answer", [["72"], {"text": ["72"], "answer_start": [0]}])
def test_an_answer_that_is_no_text_is_refused(tmp_path: Path, qwen: tok.ChatTokenizer, answer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps({'question': 'How many?', 'answer': answer})}\n" * 3)
    with pytest.raises(ValueError, match="dataset: a prompt or an answer must be text or a number, got .*72"):
        load_task("t", section(path), None, None, qwen, SEED)


def test_validation_is_split_off_by_seed(rows_file: Path, qwen: tok.ChatTokenizer) -> None:
    task, _ = load_task("t", section(rows_file, test_examples=7), None, None, qwen, SEED)
    train, val, test = numbers(task.train), numbers(task.val), numbers(task.test)
    assert (len(train), len(val), len(test)) == (83, 10, 7)
    assert sorted(train + val + test) == list(range(100))
    again, _ = load_task("t", section(rows_file, test_examples=7), None, None, qwen, SEED)
    assert numbers(again.val) == val
    other, _ = load_task("t", section(rows_file, test_examples=7), None, None, qwen, SEED + 1)
    assert numbers(other.val) != val
    larger, _ = load_task("t", section(rows_file, val_fraction=0.3), None, None, qwen, SEED)
    assert len(larger.val) == 30


def test_size_of_the_training_set_does_not_change_what_chooses(rows_file: Path, qwen: tok.ChatTokenizer) -> None:
    whole, _ = load_task("t", section(rows_file), None, None, qwen, SEED)
    few, _ = load_task("t", section(rows_file, max_examples=20), None, None, qwen, SEED)
    assert len(few.train) == 20
    assert numbers(few.train) == numbers(whole.train)[:20]
    assert numbers(few.val) == numbers(whole.val)
    given, _ = load_task(
        "t", section(rows_file, split="train[:50]", max_examples=5), {"split": "train[50:]"}, None, qwen, SEED
    )
    assert len(given.val) == 50


def test_sections_inherit(rows_file: Path, qwen: tok.ChatTokenizer, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "Q", "answer": "500"}')
    cfg = section(rows_file, split="train[:-30]", shuffle_seed=1)
    task, _ = load_task("t", cfg, {"split": "train[-30:-10]", "max_examples": 5}, {"source": str(other)}, qwen, SEED)
    assert sorted(numbers(task.train)) == list(range(70))
    assert numbers(task.train) != list(range(70)), "shuffle_seed has no effect"
    assert len(task.val) == 5
    assert set(numbers(task.val)) <= set(range(70, 90))
    assert numbers(task.test) == [500]


def test_shared_rows_are_refused(rows_file: Path, qwen: tok.ChatTokenizer) -> None:
    with pytest.raises(ValueError, match=r"dataset_val: 20 of its 20 rows are training rows too"):
        load_task("t", section(rows_file), {"split": "train[-20:]"}, None, qwen, SEED)
    with pytest.raises(ValueError, match="dataset_test: reads the same rows as dataset"):
        load_task("t", section(rows_file), None, {"max_examples": 20}, qwen, SEED)


def test_report(rows_file: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    answers = ["yes", "yes", "", None, "yes " * 200, *["no"] * 20]
    path.write_text("\n".join(json.dumps({"question": "How?", "answer": a}) for a in answers))
    tokenizer = tok.load(str(folders["qwen2_5"]), max_seq_len=120)
    task, report = load_task("mixed", section(path, split="train[:5]"), {"split": "train[5:]"}, None, tokenizer, SEED)
    train, val = report.splits
    assert (train.kept, train.too_long, train.no_labels, train.truncated) == (2, 1, 2, 0)
    assert (val.kept, val.name) == (20, "val")
    assert val.percentiles == (len(task.val[0]) + 2,) * 4, "one token more than the kept ones: the template's newline"
    assert val.label_tokens == sum(e.n_labels for e in task.val)
    text = str(report)
    assert "<|im_start|>assistant\n  | ⟦yes<|im_end|>⟧" in text
    assert text.count("⟦") == 2 * len(task.train), "a heading and one labelled part each"
    assert re.search(r"too long +no labels", text)


def test_no_example_left(rows_file: Path, folders: dict[str, Path]) -> None:
    tokenizer = tok.load(str(folders["qwen2_5"]), max_seq_len=4)
    with pytest.raises(
        ValueError, match=r"dataset: none of its 90 examples can be used: 90 are longer than max_seq_len 4"
    ):
        load_task("t", section(rows_file), None, None, tokenizer, SEED)


def test_classification(rows_file: Path, qwen: tok.ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("one,two,label\na,b,1\nc,d,0\ne,f,-1\ng,h,yes\n" + "i,j,0\n" * 20)
    cfg = {
        "_component_": "plora.data.classification",
        "source": str(path),
        "text_columns": ["one", "two"],
        "label_words": ["no", "yes"],
        "split": "train[:4]",
    }
    task, report = load_task("pairs", cfg, {"split": "train[4:]"}, None, qwen, SEED)
    assert [e.answer for e in task.train] == ["yes", "no", "yes"]
    assert report.splits[0].no_labels == 1
    assert task.train[0].messages[-1]["content"] == "One: a\nTwo: b\nAnswer with one word: no or yes."
    assert task.train[0].fields["label_words"] == ("no", "yes")
    bad = {**cfg, "label_words": {"1": "yes", "2": "no"}}
    with pytest.raises(ValueError, match=r"the label '0' has no word; label_words has words for 1, 2"):
        load_task("pairs", bad, {"split": "train[4:]"}, None, qwen, SEED)


@pytest.mark.parametrize("style", ["openai", "sharegpt"])
def test_chats(qwen: tok.ChatTokenizer, tmp_path: Path, style: str) -> None:
    turns = [("user", "One?"), ("assistant", "yes"), ("user", "Two?"), ("assistant", "no"), ("user", "Bye")]
    names = {"user": "human", "assistant": "gpt"}
    rows = [
        {
            "talk": [
                {"from": names[r], "value": c} if style == "sharegpt" else {"role": r, "content": c} for r, c in turns
            ]
        }
    ] * 3
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(rows))
    cfg = {
        "_component_": "torchtune.datasets.chat_dataset",
        "source": str(path),
        "conversation_column": "talk",
        "conversation_style": style,
        "new_system_prompt": "Short.",
    }
    task, _ = load_task("chat", cfg, None, None, qwen, SEED)
    assert labelled(qwen, task.train[0]) == "yesno"
    assert "system\nShort." in qwen.decode(task.train[0].inputs)
    assert "Bye" not in qwen.decode(task.train[0].inputs)
    last, _ = load_task("chat", {**cfg, "train_on": "last"}, None, None, qwen, SEED)
    assert labelled(qwen, last.train[0]) == "no"


def test_generated_dates(qwen: tok.ChatTokenizer) -> None:
    cfg = {"_component_": "plora.data.dates", "n": 40, "seed": 2}
    val, test = {"split": "val", "n": 10}, {"split": "test", "n": 12}
    assert check(cfg, val, test) == []
    task, _ = load_task("dates", cfg, val, test, qwen, SEED)
    assert (len(task.train), len(task.val), len(task.test)) == (40, 10, 12)
    split_off, _ = load_task("dates", cfg, None, None, qwen, SEED)
    assert not {e.answer for e in split_off.train} & {e.answer for e in split_off.val}


@pytest.fixture
def component(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("my_components")
    monkeypatch.setitem(sys.modules, "my_components", module)
    return module


def test_own_components(component: types.ModuleType, qwen: tok.ChatTokenizer) -> None:
    class Message:
        def __init__(self, role: str, text: str) -> None:
            self.role, self.text_content = role, text

    class TunedDataset:
        _data = range(20)

        @staticmethod
        def _message_transform(i: int) -> dict[str, Any]:
            return {"messages": [Message("system", ""), Message("user", f"{i}?"), Message("assistant", str(i))]}

    component.rows = lambda n: ({"input": f"{i}?", "output": str(i)} for i in range(n))
    component.table = lambda n: datasets.Dataset.from_list([{"q": f"{i}?", "output": str(i)} for i in range(n)])
    component.tuned = lambda tokenizer: TunedDataset()
    for cfg in (
        {"_component_": "my_components.rows", "n": 20},
        {"_component_": "my_components.table", "n": 20, "column_map": {"input": "q"}},
        {"_component_": "my_components.tuned"},
    ):
        assert check(cfg) == []
        task, _ = load_task("own", cfg, None, None, qwen, SEED)
        assert sorted(numbers(task.train + task.val)) == list(range(20))
        assert task.train[0].messages == ({"role": "user", "content": f"{task.train[0].answer}?"},)
    component.wrong = lambda: ["text"]
    with pytest.raises(ValueError, match="must return rows"):
        load_task("own", {"_component_": "my_components.wrong"}, None, None, qwen, SEED)


def test_row_that_lacks_a_column(tmp_path: Path, qwen: tok.ChatTokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n' * 3 + '{"question": "a", "anser": "b"}\n')
    with pytest.raises(ValueError, match=r"a row has no column 'answer'; did you mean 'anser'"):
        load_task("t", section(path, split="train[1:]"), {"split": "train[:1]"}, None, qwen, SEED)


def test_too_few_rows_to_split(tmp_path: Path, qwen: tok.ChatTokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(ValueError, match="of 1 rows, 1 would be split off"):
        load_task("t", section(path), None, None, qwen, SEED)


class FakeHub:
    """Answers as the datasets library does, for two splits of ten rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.table = datasets.Dataset.from_list([{"question": f"{i}?", "answer": str(i)} for i in range(10)])
        monkeypatch.setattr(hub, "unreachable", lambda: None)
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)
        monkeypatch.setattr(datasets, "load_dataset_builder", self.load_dataset_builder)

    def load_dataset(self, path: str, name: str | None = None, split: str | None = None) -> datasets.Dataset:
        if path == "owner/gone":
            raise ConnectionError("Couldn't reach 'owner/gone' on the Hub")
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'test'].")
        return self.table

    def load_dataset_builder(self, path: str, name: str | None = None) -> types.SimpleNamespace:
        if path == "owner/gone":
            raise ConnectionError("Couldn't reach 'owner/gone' on the Hub")
        info = types.SimpleNamespace(splits={"train": 0, "test": 0}, features=self.table.features)
        return types.SimpleNamespace(info=info)


def test_hub(monkeypatch: pytest.MonkeyPatch, qwen: tok.ChatTokenizer) -> None:
    FakeHub(monkeypatch)
    cfg = section(Path("owner/rows"), name="main", split="train[:-3]")
    assert check(cfg, {"split": "train[-3:]"}, {"split": "test"}) == []
    task, _ = load_task("t", cfg, {"split": "train[-3:]"}, {"split": "test"}, qwen, SEED)
    assert numbers(task.train) == list(range(7))
    assert numbers(task.val) == [7, 8, 9]
    assert len(task.test) == 10
    with pytest.raises(ValueError, match="dataset_val: 3 of its 5 rows are training rows too"):
        load_task("t", {**cfg, "split": "train[:8]"}, {"split": "train[-5:]"}, None, qwen, SEED)


def test_hub_mistakes(monkeypatch: pytest.MonkeyPatch, qwen: tok.ChatTokenizer) -> None:
    FakeHub(monkeypatch)
    wrong_split = section(Path("owner/rows"), split="trian")
    assert check(wrong_split) == ["dataset: there is no split 'trian'; did you mean 'train'? There are: train, test"]
    with pytest.raises(ValueError, match=r"split 'trian'.*Should be one of"):
        load_task("t", wrong_split, None, None, qwen, SEED)
    (found,) = check(section(Path("owner/rows"), column_map={"input": "question", "output": "anwser"}))
    assert "did you mean 'answer'" in found
    (found,) = check(section(Path("owner/gone")))
    assert "cannot be had from the hub: Couldn't reach" in found


def test_unreachable_hub_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    (found,) = check(section(Path("owner/rows")))
    assert "http://127.0.0.1:9 cannot be reached" in found
    assert "HF_HUB_OFFLINE=1" in found


GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs the GSM8K files")
def test_gsm8k(qwen: tok.ChatTokenizer) -> None:
    cfg = section(GSM8K, split="train[:200]")
    task, report = load_task("gsm8k", cfg, {"split": "train[-50:]"}, {"split": "test[:50]"}, qwen, SEED)
    assert (len(task.train), len(task.val), len(task.test)) == (200, 50, 50)
    for example in task.train:
        assert labelled(qwen, example) == example.answer
        assert "####" in example.answer
    assert "#### 72<|im_end|>⟧" in str(report)
