"""Line files survive a killed process and hold valid JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch

from plora.checkpoint.jsonl import JsonLines, jsonable, read_jsonl


def test_records_are_on_disk_at_once_and_in_order(tmp_path):
    path = tmp_path / "made" / "m.jsonl"
    lines = JsonLines(path)
    for step in range(3):
        lines.append({"step": step})
        assert [record["step"] for record in read_jsonl(path)] == list(range(step + 1))
    lines.close()
    lines.append({"step": 3})
    lines.close()
    assert len(list(read_jsonl(path))) == 4


def test_non_finite_numbers_become_null(tmp_path):
    path = tmp_path / "m.jsonl"
    with JsonLines(path) as lines:
        lines.append({"loss": math.nan, "norms": [math.inf, 1.0], "np": np.float32("nan")})
    assert json.loads(path.read_text(), parse_constant=lambda name: 1 / 0) == {
        "loss": None,
        "norms": [None, 1.0],
        "np": None,
    }


def test_a_torn_line_is_passed_over_and_not_continued(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with JsonLines(path) as lines:
        lines.append({"step": 3})
    assert [record["step"] for record in read_jsonl(path)] == [1, 3]


def test_a_missing_file_holds_nothing(tmp_path):
    assert list(read_jsonl(tmp_path / "none")) == []


def test_values_of_other_libraries():
    values = {"t": torch.tensor(2.5), "n": np.int64(3), "p": Path("/x"), 4: (True, None), "b": torch.tensor([1, 2])}
    assert jsonable(values) == {"t": 2.5, "n": 3, "p": "/x", "4": [True, None], "b": [1, 2]}
