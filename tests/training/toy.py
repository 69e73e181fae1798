"""Tiny models as Hugging Face folders, and tiny tasks to train them on."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers

from plora.data.types import IGNORE_INDEX, Example, Task
from plora.models import from_pretrained
from plora.models.base import BaseModel
from plora.modules.config import AdapterConfig
from plora.modules.packed import PackedAdapters, pack_adapters
from plora.search.trial import Trial
from plora.training.job import PackJob
from plora.training.records import EvalRecord, JobSettings, Listener, RoundRecord, StepRecord, TrialResult

VOCAB = 211
FAMILIES = ("llama", "qwen2", "qwen3")
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def hf_model(family: str) -> transformers.PreTrainedModel:
    """Llama with an untied head, Qwen2 with tied embeddings and q/k/v bias, Qwen3, which torchtune lacks."""
    if family == "llama":
        config = transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=False)
    elif family == "qwen2":
        config = transformers.Qwen2Config(**_SHAPE, tie_word_embeddings=True)
    else:
        config = transformers.Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # At the usual 0.02 a tiny model predicts next to nothing and biases are zero.
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def save(family: str, folder: Path) -> Path:
    """The family's tiny checkpoint in ``folder``."""
    hf_model(family).save_pretrained(folder)
    return folder


def load(folder: Path) -> BaseModel:
    """The base model of a folder, not packed yet."""
    return from_pretrained(folder, dtype="fp32")


@cache
def task(name: str, seed: int, n: int = 40, longest: int = 20) -> Task:
    """Ragged examples whose answer repeats part of the prompt."""
    rng = np.random.default_rng(seed)

    def example() -> Example:
        prompt = rng.integers(2, VOCAB, rng.integers(3, longest - 4)).astype(np.int32)
        answer = np.concatenate((prompt[: rng.integers(1, 4)], [1])).astype(np.int32)
        whole = np.concatenate((prompt, answer))
        labels = whole[1:].copy()
        labels[: len(prompt) - 1] = IGNORE_INDEX
        return Example(whole[:-1], labels, prompt, " ".join(map(str, answer[:-1])))

    return Task(name, *([example() for _ in range(k)] for k in (n, 12, 5)))


class Recorder(Listener):
    """Keeps everything that it is told, and each adapter's final factors."""

    def __init__(self) -> None:
        self.order: list[tuple[str, str]] = []
        self.steps: dict[str, list[StepRecord]] = {}
        self.rounds: list[RoundRecord] = []
        self.evals: dict[str, list[EvalRecord]] = {}
        self.results: dict[str, TrialResult] = {}
        self.factors: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}

    def on_start(self, trial: Trial, total_steps: int) -> None:
        self.order.append(("start", trial.name))
        self.steps[trial.name], self.evals[trial.name] = [], []

    def on_step(self, trial: Trial, record: StepRecord) -> None:
        self.order.append(("step", trial.name))
        self.steps[trial.name].append(record)

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append(record)

    def on_eval(self, trial: Trial | None, record: EvalRecord) -> None:
        name = trial.name if trial else f"base {record.task}"
        self.order.append(("eval", name))
        self.evals.setdefault(name, []).append(record)

    def on_finish(self, trial: Trial, result: TrialResult, adapter: object) -> None:
        self.order.append(("finish", trial.name))
        self.results[trial.name] = result
        self.factors[trial.name] = {
            path: (a.clone(), b.clone())
            for path, (a, b) in adapter.factors().items()  # type: ignore[attr-defined]
        }

    def losses(self, name: str) -> torch.Tensor:
        return torch.tensor([record.loss for record in self.steps[name]], dtype=torch.float64)

    def flat(self, name: str) -> torch.Tensor:
        return torch.cat([f.flatten() for pair in self.factors[name].values() for f in pair]).double()


def train(
    base: BaseModel, trials: list[Trial], tasks: dict[str, Task], **settings: object
) -> tuple[Recorder, list[TrialResult]]:
    """One job on ``base``, which is packed for it and unpacked again."""
    packed = pack(base, [trial.adapter for trial in trials])
    recorder = Recorder()
    try:
        options = {"token_budget": 128, "eval_every": None, **settings}
        results = PackJob(base, packed, trials, tasks, JobSettings(**options), recorder).run()  # type: ignore[arg-type]
    finally:
        packed.unpack(base.module)
    return recorder, results


def pack(base: BaseModel, configs: list[AdapterConfig]) -> PackedAdapters:
    """The base with adapters whose B is zero, as they start."""
    return pack_adapters(base.module, configs)


def mixed_trials(steps: int = 32) -> tuple[list[Trial], dict[str, Task]]:
    """Trials that differ in everything, and their data."""
    first, second = task("first", 1), task("second", 2, n=33, longest=12)
    qv, mlp = ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
    made = [
        Trial(0, "a", AdapterConfig(rank=4, alpha=8, seed=1), lr=5e-3, batch_size=3, max_steps=steps, seed=1),
        Trial(
            1, "b", AdapterConfig(rank=16, alpha=16, dropout=0.2, target_modules=qv, seed=2), lr=1e-2, batch_size=1,
            max_steps=steps + 4, schedule="linear", warmup_fraction=0.2, weight_decay=0.1, seed=2,
        ),
        Trial(
            2, "c", AdapterConfig(rank=1, alpha=4, target_modules=mlp, rslora=True, seed=3), lr=3e-3, batch_size=8,
            max_steps=steps, schedule="constant", betas=(0.8, 0.95), max_grad_norm=None, loraplus_ratio=4.0, seed=3,
        ),
        Trial(
            3, "d", AdapterConfig(rank=8, alpha=8, dropout=0.5, seed=4), lr=2e-2, batch_size=5,
            max_steps=steps - 2, max_grad_norm=0.3, warmup_fraction=0.0, seed=4,
        ),
    ]  # fmt: skip
    return made, {"a": first, "b": first, "c": second, "d": second}
