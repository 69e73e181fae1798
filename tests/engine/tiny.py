"""Sweeps small enough for a test: a random Llama of two layers with a chat tokenizer, and questions in JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from plora.data.types import Example
from plora.report.trackers import Tracker
from tests.data.conftest import LLAMA3, LLAMA_SPECIAL, build

Tree = dict[str, Any]
MIXED: list[Tree] = [
    {"rank": 8, "lr": 1e-2, "batch_size": 3, "target_modules": "all-linear"},
    {"rank": 2, "lr": 3e-2, "batch_size": 8, "dropout": 0.2, "target_modules": ["down_proj", "o_proj"]},
    {"rank": 4, "lr": 3e-3, "max_steps": 3, "schedule": "constant", "rslora": True},
]


def save_model(folder: Path) -> Path:
    """Writes the checkpoint: weights large enough that every layer matters, tokenizer and chat template."""
    build(folder, LLAMA_SPECIAL, bos="<|begin_of_text|>", eos="<|eot_id|>", template=LLAMA3)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            # A head of large weights: otherwise no hidden state could make an answer likely.
            parameter.data.normal_(std=1.0 if name.startswith("lm_head") else 0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


def save_rows(path: Path, numbers: Iterable[int], ask: str = "What is {}?") -> Path:
    """Writes questions of unequal length, whose answer is one of three words."""
    rows = [
        {"question": ask.format(n) + " again" * (n % 3), "answer": ("yes", "no", "maybe")[n % 3], "label": n % 3}
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_data(folder: Path) -> Path:
    """Writes ``train``, ``val`` and ``test``, and ``other_...`` of another data set."""
    for name, ask in (("", "What is {}?"), ("other_", "Say {}")):
        for split, numbers in (("train", range(12)), ("val", range(12, 18)), ("test", range(18, 22))):
            save_rows(folder / f"{name}{split}.jsonl", numbers, ask)
    return folder


def settings(output_dir: Path, model: Path, data: Path, /, **changes: Any) -> Tree:
    """A sweep of ``MIXED`` on one data set by validation loss; ``changes`` replace whole top-level sections."""
    tree: Tree = {
        "output_dir": str(output_dir),
        "seed": 3,
        "device": "cpu",
        "model": {"source": str(model), "dtype": "fp32"},
        "tokenizer": {"max_seq_len": 128},
        "dataset": section(data),
        "dataset_val": {"source": str(data / "val.jsonl")},
        "dataset_test": {"source": str(data / "test.jsonl")},
        "trial": {"rank": 4, "lr": 1e-2, "batch_size": 4, "max_steps": 4, "target_modules": ["q_proj", "v_proj"]},
        "search": {"trials": MIXED},
        "evaluation": {"every": 0.5},
        "export": {"dtype": "fp32"},
        **changes,
    }
    return {key: value for key, value in tree.items() if value is not None}


def section(data: Path, name: str = "train") -> Tree:
    """The settings of a data set of questions and answers."""
    return {"source": str(data / f"{name}.jsonl"), "column_map": {"input": "question", "output": "answer"}}


def two_datasets(data: Path) -> Tree:
    """The changes to ``settings`` that train the last trial of ``MIXED`` on other data."""
    named = {}
    for name, prefix in (("questions", ""), ("orders", "other_")):
        held_out = {split: {"source": str(data / f"{prefix}{split}.jsonl")} for split in ("val", "test")}
        named[name] = section(data, f"{prefix}train") | held_out
    trials = [*MIXED[:-1], MIXED[-1] | {"dataset": "orders"}]
    nothing = dict.fromkeys(("dataset", "dataset_val", "dataset_test"))
    return {**nothing, "datasets": named, "search": {"trials": trials}}


def shares_letters(prediction: str, example: Example) -> float:
    """A metric of the user's own: what part of the answer's letters the prediction has."""
    return len(set(prediction) & set(example.answer)) / len(set(example.answer))


def no_weights(*args: Any, **kwargs: Any) -> None:
    """A loader of base models whose download breaks off."""
    raise ValueError("the hub is down")


def read_lines(path: Path) -> list[Mapping[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Quiet(Tracker):
    """A tracker that keeps nothing."""

    package = "json"

    def start_run(self, trial: Any, settings: Mapping[str, Any], total_steps: int) -> str:
        return str(trial.name)

    def log(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def end_run(self, run: Any, settings: Mapping[str, Any], state: str, summary: Mapping[str, float]) -> None:
        pass


class Notebook(Quiet):
    """A tracker that keeps what it is told."""

    told: ClassVar[list[tuple[Any, ...]]] = []

    def start_run(self, trial: Any, settings: Mapping[str, Any], total_steps: int) -> str:
        self.told.append(("start", trial.name, settings["rank"], total_steps))
        return str(trial.name)

    def log(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        self.told.append(("step" if "train/loss" in metrics else "eval", run, step))

    def end_run(self, run: Any, settings: Mapping[str, Any], state: str, summary: Mapping[str, float]) -> None:
        self.told.append(("end", run, state))


class Broken(Quiet):
    """A tracker one of whose methods raises."""

    def __init__(self, method: str) -> None:
        super().__init__()

        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("the server is gone")

        setattr(self, method, fail)


class Interrupter(Quiet):
    """Stands for a user who presses control-C when the first trial reaches ``step``."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def log(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        if step >= self._step and "train/loss" in metrics:
            raise KeyboardInterrupt
