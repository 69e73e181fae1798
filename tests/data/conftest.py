"""Small tokenizers with the special tokens and templates of published checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from plora.data import tokenizer as tok

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.\n\n",
    "system user assistant You are a helpful assistant. You are Qwen, created by Alibaba Cloud.\n",
    "How many clips did Natalia sell altogether in April and May?\n\n\n#### 72\nyes no maybe\n",
]

# The two templates as published, without their branches for tools.
QWEN2_5 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Qwen3 writes an empty thought before the last answer; asked not to think, into the generation prompt too.
THINKING = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def build(
    folder: Path,
    special: list[str],
    *,
    eos: str,
    pad: str | None = None,
    bos: str | None = None,
    template: str | None = None,
    generation_eos: list[str] | None = None,
) -> Path:
    """Writes a byte-level BPE tokenizer as a checkpoint's folder holds it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    hf = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=pad, bos_token=bos)
    hf.chat_template = template
    hf.save_pretrained(folder)
    if generation_eos:
        ids = [bpe.token_to_id(t) for t in generation_eos]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizer folders by kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    qwen = {"special": QWEN_SPECIAL, "pad": "<|endoftext|>"}
    return {
        "qwen2_5": build(
            root / "Qwen2.5-Tiny-Instruct",
            **qwen,
            eos="<|im_end|>",
            template=QWEN2_5,
            generation_eos=["<|im_end|>", "<|endoftext|>"],
        ),
        "qwen2_5_base": build(root / "Qwen2.5-Tiny", **qwen, eos="<|endoftext|>", template=QWEN2_5),
        "llama3": build(
            root / "Llama-3-Tiny-Instruct",
            LLAMA_SPECIAL,
            bos="<|begin_of_text|>",
            eos="<|eot_id|>",
            template=LLAMA3,
            generation_eos=["<|end_of_text|>", "<|eot_id|>"],
        ),
        "llama3_base": build(root / "Llama-3-Tiny", LLAMA_SPECIAL, bos="<|begin_of_text|>", eos="<|end_of_text|>"),
        "eos_is_pad": build(root / "SmolTiny", QWEN_SPECIAL, eos="<|im_end|>", pad="<|im_end|>", template=QWEN2_5),
        "thinking": build(root / "Thinking-Tiny", **qwen, eos="<|im_end|>", template=THINKING),
    }


@pytest.fixture(scope="session")
def qwen(folders: dict[str, Path]) -> tok.ChatTokenizer:
    """A tokenizer with Qwen2.5's template."""
    return tok.load(str(folders["qwen2_5"]))


@pytest.fixture(scope="session")
def llama(folders: dict[str, Path]) -> tok.ChatTokenizer:
    """A tokenizer with Llama 3's template."""
    return tok.load(str(folders["llama3"]))


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """A hundred questions whose answer is their number."""
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"What is {i}?", "answer": str(i), "label": i % 2} for i in range(100)]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path
