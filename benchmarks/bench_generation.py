"""Packed generation on this machine: a decode step of many adapters' rows, as CUDA graphs and eagerly.

    python benchmarks/bench_generation.py [--json FILE] [--rows 64] [--new-tokens 128] [--small]

A 1.1B Llama with random weights and eight adapters of rank 16; prompts of 60 to 200 tokens, answers that never stop
early. What the prompts take is measured by answers of one token, and left out of the figures of a step. Each kind of
run comes once before it is timed. Without a GPU there are eager steps alone.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

import plora
from bench_sweep import LARGE, SMALL
from plora.models import from_config
from plora.models.base import BaseModel
from plora.training import decoding
from plora.training.budget import TokenBudget
from plora.training.generation import Prompt, generate
from plora.training.loss import can_compile
from records import Records

ADAPTERS, RANK, VOCABULARY = 8, 16, 32000
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}  # fmt: skip


def prompts(rows: int) -> list[Prompt]:
    """Each adapter's in turn."""
    draw = random.Random(0)
    lengths = [draw.randint(60, 200) for _ in range(rows)]
    return [Prompt(i % ADAPTERS, draw.choices(range(VOCABULARY), k=n)) for i, n in enumerate(lengths)]


def seconds(base: BaseModel, run: Callable[[], object], repeats: int) -> float:
    """The shortest of the runs after the first."""
    took = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return min(took[1:])


def run(records: Records, rows: int, new_tokens: int, shape: dict[str, int], repeats: int) -> None:
    """Time answers of ``new_tokens`` for all rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = from_config({**LLAMA, **shape}, dtype="bf16" if device.type == "cuda" else "fp32", device=device)
    packed = plora.pack_adapters(base.module, [plora.AdapterConfig(rank=RANK, seed=i) for i in range(ADAPTERS)])
    if can_compile(device):
        base.compile_layers()
    asked = prompts(rows)

    def answer(count: int) -> None:
        budget = TokenBudget(rows * (200 + count), "generation")
        generate(base, packed, asked, max_new_tokens=count, stop=(), cache_budget=budget)

    prefill = seconds(base, lambda: answer(1), repeats)
    case = f"{rows} rows, {ADAPTERS} x r{RANK}, {new_tokens} tokens each"
    before = decoding._CAPTURE_STEPS
    providers = {"CUDA graphs": before, "eager": new_tokens} if device.type == "cuda" else {"eager": before}
    for provider, fewest_steps in providers.items():
        decoding._CAPTURE_STEPS = fewest_steps
        try:
            took = seconds(base, lambda: answer(new_tokens), repeats)
        finally:
            decoding._CAPTURE_STEPS = before
        records.add(case, provider, "step", (took - prefill) / (new_tokens - 1) * 1e3, "ms")
        records.add(case, provider, "tokens_per_s", rows * new_tokens / took, "tokens/s", "prompts included")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a model of two layers")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.new_tokens < 2:
        parser.error(f"--new-tokens {options.new_tokens}: the first comes with the prompt, give at least 2")
    records = Records("generation")
    run(records, options.rows, options.new_tokens, SMALL if options.small else LARGE, options.repeats)
    records.write(options.json)
    print(records.table())


if __name__ == "__main__":
    main()
