"""Every mistake in the data sections is found before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plora.data import check


def section(path: Path, **more: Any) -> dict[str, Any]:
    return {
        "_component_": "torchtune.datasets.instruct_dataset",
        "source": str(path),
        "column_map": {"input": "question", "output": "answer"},
        **more,
    }


def test_correct_sections_have_no_mistakes(rows_file: Path) -> None:
    assert check(section(rows_file, split="train[:-20]"), {"split": "train[-20:]"}) == []


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"colum_map": 1}, "dataset.colum_map: unknown key; did you mean 'column_map'"),
        (
            {"column_map": {"input": "qestion", "output": "answer"}},
            "column_map.input: there is no column 'qestion'; did you mean 'question'",
        ),
        ({"column_map": {"inputs": "question"}}, "column_map.inputs: unknown key"),
        ({"column_map": "question"}, "must map input and output"),
        ({"prompt_template": "{qestion}"}, "prompt_template: there is no column 'qestion'; did you mean 'question'"),
        ({"split": "train[5"}, "dataset.split: 'train[5' is not a split"),
        ({"split": "train[200:]"}, "has no rows (split 'train[200:]')"),
        ({"data_files": {"train": "rows.jsonl"}}, "is not a folder"),
        ({"source": "missing.jsonl"}, "the file 'missing.jsonl' does not exist"),
        ({"source": None}, "dataset.source: is missing"),
        ({"max_examples": 0}, "max_examples: must be a whole number of at least 1, got 0"),
        ({"val_fraction": 1.5}, "val_fraction: must lie between 0 and 1, got 1.5"),
        ({"val_fraction": 0.5, "val_examples": 3}, "val_fraction: give it or val_examples"),
        ({"train_on_input": True}, "prompts are never trained on"),
        ({"packed": True}, "remove it"),
        ({"system_prompt": 5}, "system_prompt: must be text, got 5"),
        ({"_component_": "plora.data.chat_dataset", "column_map": None}, "column_map: unknown key"),
        ({"_component_": "no.such.thing"}, "the component 'no.such.thing' cannot be imported"),
        ({"_component_": "plora.data.date"}, "did you mean 'plora.data.dates'"),
        ({"_component_": "plora.data.dates"}, "does not take these settings"),
    ],
)
def test_mistakes(rows_file: Path, change: dict[str, Any], want: str) -> None:
    found = check({**section(rows_file), **change})
    assert any(want in mistake for mistake in found), found
    assert all(mistake.startswith("dataset") for mistake in found)


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"label_words": None}, "label_words: give at least two words"),
        ({"label_words": [False, True]}, "put yes, no, true and numbers in quotes"),
        ({"label_words": ["a", "a"]}, "must differ"),
        ({"text_columns": None}, "text_columns: name the column"),
        ({"text_columns": ["questio"]}, "text_columns: there is no column 'questio'; did you mean 'question'"),
        ({"label_column": "lable"}, "label_column: there is no column 'lable'; did you mean 'label'"),
    ],
)
def test_classification_mistakes(rows_file: Path, change: dict[str, Any], want: str) -> None:
    cfg = {
        "_component_": "plora.data.classification",
        "source": str(rows_file),
        "text_columns": "question",
        "label_words": ["even", "odd"],
    }
    assert check(cfg) == []
    found = check({**cfg, **change})
    assert len(found) == 1, found
    assert want in found[0]


def test_all_mistakes_at_once_and_inherited_ones_once(rows_file: Path) -> None:
    cfg = section(rows_file, mx_examples=5, split="train[:50]", column_map={"input": "question", "output": "anwer"})
    found = check(cfg, {"split": "train[50:]", "max_examples": -1}, {"source": "no.jsonl"}, where="datasets.mine")
    assert [m.split(":")[0] for m in found] == [
        "datasets.mine.mx_examples",
        "datasets.mine.column_map.output",
        "dataset_val.max_examples",
        "dataset_test",
    ]


def test_settings_without_effect(rows_file: Path) -> None:
    found = check(section(rows_file, split="train[:50]", val_examples=5), {"split": "train[50:]"})
    assert found == ["dataset.val_examples: has no effect beside dataset_val; remove one of them"]


def test_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "a", "answer"}\n')
    (found,) = check(section(path))
    assert "rows.jsonl, line 2 is not valid JSON" in found
