"""A whole sweep on this machine, predicted and measured: loading, jobs, evaluation, saving, the scores at the end.

    python benchmarks/bench_sweep.py [--json FILE] [--folder FOLDER] [--small]

Eight trials (ranks 4 to 128, batches of 2 to 32 sequences) of a 1.1B Llama with random weights, one epoch of 800
made-up questions of 20 to 300 tokens. The device is calibrated first, which is no part of the figures. A second sweep,
of at most three adapters at a time, plans with what the first has learned.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import plora
from records import Records

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.data.conftest import LLAMA3, LLAMA_SPECIAL, build

LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
         "num_key_value_heads": 4}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
RANKS_AND_BATCHES = ((8, 4), (8, 16), (32, 8), (64, 16), (16, 32), (128, 8), (4, 2))
WORDS = ("alpha", "beta", "gamma", "delta", "one", "two", "three", "what", "is", "the", "sum", "of", "and", "yes", "no",
         "maybe")  # fmt: skip


def make_base(folder: Path, shape: dict[str, int]) -> Path:
    """A model with random bf16 weights and a tokenizer, as a folder."""
    base = build(folder / "Base-Instruct", LLAMA_SPECIAL, bos="<|begin_of_text|>", eos="<|eot_id|>", template=LLAMA3)
    vocab = max(len(AutoTokenizer.from_pretrained(base)), 32000 if shape is LARGE else 0)
    config = LlamaConfig(vocab_size=vocab, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, **shape)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.cpu().save_pretrained(base)
    return base


def make_rows(path: Path, count: int, draw: random.Random) -> str:
    """Questions and answers of random words."""

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    rows = [{"question": words(5, 60), "answer": words(2, 30)} for _ in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def settings(folder: Path, base: Path, rows: int) -> dict[str, Any]:
    """The sweep's configuration."""
    draw = random.Random(0)
    sources = {
        split: make_rows(folder / f"{split}.jsonl", count, draw)
        for split, count in (("train", rows), ("val", rows // 20), ("test", rows // 20))
    }
    return {
        "seed": 1,
        "model": {"source": str(base), "dtype": "bf16"},
        "tokenizer": {"max_seq_len": 512},
        "dataset": {"source": sources["train"], "column_map": {"input": "question", "output": "answer"}},
        "dataset_val": {"source": sources["val"]},
        "dataset_test": {"source": sources["test"]},
        "trial": {"rank": 16, "lr": 1e-4, "batch_size": 8, "epochs": 1, "target_modules": "all-linear"},
        "search": {"trials": [{"rank": rank, "batch_size": batch} for rank, batch in RANKS_AND_BATCHES]},
        "evaluation": {"every": 0.25},
        "export": {"keep": 1},
    }


def run(records: Records, folder: Path, small: bool) -> None:
    """Both sweeps."""
    tree = settings(folder, make_base(folder, SMALL if small else LARGE), 60 if small else 800)
    for name, packing in (
        ("first", {"calibrate": "always"}),
        ("second, 3 at a time", {"calibrate": "auto", "max_adapters": 3}),
    ):
        output = folder / name.partition(",")[0]
        plora.sweep({**tree, "output_dir": str(output), "packing": packing})
        with (output / "predictions.csv").open() as file:
            for row in csv.DictReader(file):
                case, metric = f"{name}/{row['of']}", row["figure"]
                for provider in ("predicted", "measured"):
                    if row[provider]:
                        records.add(case, provider, metric, float(row[provider]), row["unit"])


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where model, data and results go; must be empty or absent")
    parser.add_argument("--small", action="store_true", help="a model of two layers and 60 questions")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    records = Records("sweep")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty: give another --folder, or none")
        try:
            run(records, folder, options.small)
        finally:
            records.write(options.json)
    print(records.table())


if __name__ == "__main__":
    main()
