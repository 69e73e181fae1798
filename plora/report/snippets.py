"""What to type to use an adapter elsewhere."""

from __future__ import annotations

import shlex
from pathlib import Path

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def vllm_max_lora_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` that vLLM accepts and that holds an adapter of ``rank``.

    Raises:
        ValueError: if vLLM has none as large.
    """
    for legal in _VLLM_RANKS:
        if rank <= legal:
            return legal
    raise ValueError(f"vLLM serves adapters up to rank {_VLLM_RANKS[-1]}, this one has {rank}")


def peft_snippet(adapter_dir: str | Path, base_name: str, revision: str | None) -> str:
    """Python that loads the adapter on the Hugging Face base model."""
    at = f", revision={revision!r}" if revision else ""
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "\n"
        f'base = AutoModelForCausalLM.from_pretrained({base_name!r}{at}, dtype="auto")\n'
        f"model = PeftModel.from_pretrained(base, {str(adapter_dir)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(adapter_dir)!r})"
    )


def vllm_snippet(name: str, adapter_dir: str | Path, rank: int, base_name: str, revision: str | None) -> str:
    """A shell command that serves the base model with the adapter under ``name``."""
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    module = shlex.quote(f"{name}={adapter_dir}")
    return (
        f"vllm serve {shlex.quote(base_name)}{at} --enable-lora "
        f"--lora-modules {module} --max-lora-rank {vllm_max_lora_rank(rank)}"
    )
