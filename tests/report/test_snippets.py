"""Code that people paste."""

from __future__ import annotations

import ast
import shlex

import pytest

from plora.report.snippets import peft_snippet, vllm_max_lora_rank, vllm_snippet


@pytest.mark.parametrize(
    ("rank", "legal"), [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (256, 256), (257, 320), (512, 512)]
)
def test_max_lora_rank_is_the_smallest_that_holds_it(rank, legal):
    assert vllm_max_lora_rank(rank) == legal


def test_a_rank_beyond_vllm_is_refused():
    with pytest.raises(ValueError, match="513"):
        vllm_max_lora_rank(513)


def test_vllm_command_survives_the_shell():
    words = shlex.split(vllm_snippet("t007", "/my runs/it's/adapter", 12, "org/base", "abc"))
    assert words[:5] == ["vllm", "serve", "org/base", "--revision", "abc"]
    assert words[words.index("--lora-modules") + 1] == "t007=/my runs/it's/adapter"
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert "--enable-lora" in words
    assert "--revision" not in vllm_snippet("t", "/a", 8, "b", None)


def test_peft_code_is_python_whatever_the_path():
    tree = ast.parse(peft_snippet("C:\\new\\it's", "org/base", "abc"))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert strings.count("C:\\new\\it's") == 2
    assert "org/base" in strings
    assert "abc" in strings
    assert "revision" not in peft_snippet("a", "b", None)
