"""Local files of every kind, and what is said about broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from plora.data import files

ROWS = [{"q": "one, two", "a": "1"}, {"q": 'say "hi"\nthere', "a": "ü"}]


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(r) for r in ROWS) + "\n", encoding="utf-8")
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        sep = "\t" if suffix == ".tsv" else ","
        lines = [sep.join('"' + v.replace('"', '""') + '"' for v in r.values()) for r in ROWS]
        path.write_text("\n".join([sep.join(ROWS[0]), *lines]), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", files.SUFFIXES)
def test_read_and_peek(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, suffix)
    assert files.read(path) == ROWS
    assert files.peek(path) == (["q", "a"], 2)
    monkeypatch.setattr(files, "_READ_WHOLE_BYTES", 0)
    assert files.peek(path)[0] == ["q", "a"]


def test_json_suffix_with_lines_inside(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("\n".join(json.dumps(r) for r in ROWS))
    assert files.read(path) == ROWS


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl")
    files.read(path)
    path.write_text('{"q": "new"}')
    assert files.read(path) == [{"q": "new"}]


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("a.jsonl", '{"q": 1}\n{"q": \n', r"a\.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", '{"q": 1}\n\n[1, 2]\n', r"a\.jsonl, line 3 is '\[1, 2\]', but a row is an object"),
        ("a.json", '[{"q": 1},\n {"q": }]', r"a\.json, line 2 is not valid JSON"),
        ("a.json", "[1]", r"a\.json, item 1 is '1'"),
        ("a.csv", "q,a\n1,2\n3\n", r"a\.csv, line 3 has another number of fields"),
        ("a.csv", "q,a\n1,2,3\n", r"a\.csv, line 2 has another number of fields"),
        ("a.parquet", "no", r"a\.parquet is not a Parquet file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str, want: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=want):
        files.read(path)


def test_a_long_field_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    document = "word " * 50_000
    path.write_text(f"q,a\n{document},1\n")
    assert files.read(path) == [{"q": document, "a": "1"}]


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"q,a\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        files.read(path)


def test_splits_of_a_folder_and_of_data_files(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "notes.txt"):
        (tmp_path / name).write_text('{"q": 1}')
    found = files.find(str(tmp_path), None)
    assert sorted(found) == ["test", "train"]
    with pytest.raises(ValueError, match="no split 'tset'; did you mean 'test'"):
        files.choose(found, "tset")
    named = files.find(str(tmp_path), {"train": ["t*.jsonl"], "val": "test.jsonl"})
    assert [p.name for p in named["train"]] == ["test.jsonl", "train.jsonl"]
    whole = files.find("json", str(tmp_path / "train.jsonl"))
    assert files.choose(whole, "anything") == [tmp_path / "train.jsonl"]


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"trian\.jsonl' does not exist; did you mean 'train\.jsonl'"):
        files.find(str(tmp_path / "trian.jsonl"), None)
    with pytest.raises(ValueError, match=r"is none of \.json"):
        files.find("json", str(tmp_path / "a.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.json"):
        files.find(str(tmp_path / "empty"), None)
    with pytest.raises(ValueError, match="is not a folder"):
        files.find(str(tmp_path / "train.jsonl"), "x.jsonl")


def test_is_local(tmp_path: Path) -> None:
    assert files.is_local("rows.jsonl", None)
    assert files.is_local("./rows", None)
    assert files.is_local(str(tmp_path), None)
    assert files.is_local("json", "rows.jsonl")
    assert not files.is_local("openai/gsm8k", None)
    assert not files.is_local("openai/gsm8k", "rows.jsonl")
