"""Packed training against Hugging Face's model, peft's layers, torch's AdamW and clip, transformers' schedules.

Nothing of plora computes on the other side: one adapter, one sequence at a time, in a plain loop. Only
the initial weights, the order of the examples and the dropout masks are handed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from plora.data.stream import ExampleStream
from plora.data.types import Task
from plora.kernels.dropout import combine, scaled_mask, threshold
from plora.models.base import BaseModel
from plora.modules.packed import PackedAdapters
from plora.search.trial import Trial
from tests.training import toy


@dataclass
class Place:
    """Which step, and which token of the trial's batch the sequence at hand begins with."""

    step: int = 0
    offset: int = 0


class OurMask(torch.nn.Module):
    """Stands in for peft's dropout."""

    def __init__(self, trial: Trial, group: str, place: Place) -> None:
        super().__init__()
        self.trial, self.group, self.place = trial, group, place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = combine(combine(self.trial.adapter.seed, self.place.step), combine(*self.group.encode()))
        index = torch.arange(self.place.offset, self.place.offset + x.shape[1], dtype=torch.int32)
        return x * scaled_mask(key, index, x.shape[2], threshold(self.trial.adapter.dropout), x.dtype)


def peft_model(folder: Path, base: BaseModel, packed: PackedAdapters, slot: int, trial: Trial, place: Place):  # type: ignore[no-untyped-def]
    """The Hugging Face model with the initial weights of ``slot``; also each layer's peft module by our path."""
    adapter = trial.adapter
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        target_modules=adapter.target_modules
        if isinstance(adapter.target_modules, str)
        else list(adapter.target_modules),
        lora_dropout=0.0,
    )
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(hf, config).eval()
    groups = {target.path: target.input_group for target in packed.targets}
    layers = {}
    for path, (a, b) in packed.adapters[slot].factors().items():
        layer = model.get_submodule("base_model.model." + base.hf_name(path))
        layer.lora_A["default"].weight.data.copy_(a)
        assert not b.any()
        if adapter.dropout:
            layer.lora_dropout["default"] = OurMask(trial, groups[path], place)
        layers[path] = layer
    assert len(layers) == sum(isinstance(m, peft.tuners.lora.Linear) for m in model.modules())
    return model, layers


def plain_loop(model: torch.nn.Module, trial: Trial, task: Task, place: Place) -> list[float]:
    """Losses of the training of one adapter."""
    a = [p for name, p in model.named_parameters() if "lora_A" in name]
    b = [p for name, p in model.named_parameters() if "lora_B" in name]
    groups = [{"params": a, "lr": trial.lr}, {"params": b, "lr": trial.lr * trial.loraplus_ratio}]
    optimizer = torch.optim.AdamW(groups, betas=trial.betas, eps=trial.eps, weight_decay=trial.weight_decay)
    total = trial.total_steps(len(task.train))
    schedule = transformers.get_scheduler(
        "constant_with_warmup" if trial.schedule == "constant" else trial.schedule,
        optimizer,
        num_warmup_steps=math.ceil(total * trial.warmup_fraction),
        num_training_steps=total,
    )
    stream = ExampleStream(len(task.train), trial.batch_size, trial.seed)
    losses = []
    for step in range(total):
        batch = [task.train[i] for i in stream.batch(step)]
        place.step, place.offset = step, 0
        loss = torch.zeros(())
        for example in batch:
            logits = model(input_ids=torch.tensor(example.inputs[None].tolist())).logits[0]
            labels = torch.tensor(example.labels.tolist())
            loss = loss + F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
            place.offset += len(example)
        loss = loss / sum(example.n_labels for example in batch)
        optimizer.zero_grad()
        loss.backward()
        if trial.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(a + b, trial.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_packed_training_equals_peft_in_a_plain_loop(
    folders: dict[str, Path], family: str, together: Callable[[str], toy.Recorder]
) -> None:
    base, recorder = toy.load(folders[family]), together(family)
    trials, tasks = toy.mixed_trials()
    packed = toy.pack(base, [trial.adapter for trial in trials])
    for slot, trial in enumerate(trials):
        place = Place()
        model, layers = peft_model(folders[family], base, packed, slot, trial, place)
        expected = torch.tensor(plain_loop(model, trial, tasks[trial.name], place), dtype=torch.float64)
        torch.testing.assert_close(recorder.losses(trial.name), expected, rtol=1e-5, atol=0)
        ours, theirs = [], []
        for path, (a, b) in recorder.factors[trial.name].items():
            rows = base.export_rows(path)
            ours += [a.flatten(), (b if rows is None else b[rows]).flatten()]
            theirs += [layers[path].lora_A["default"].weight.flatten(), layers[path].lora_B["default"].weight.flatten()]
        truth = torch.cat(theirs).detach().double()
        error = (torch.cat(ours).double() - truth).norm() / truth.norm()
        assert error < 1e-4, trial.name
    packed.unpack(base.module)


@pytest.mark.parametrize("wrong", ["mask", "order"])
def test_the_oracle_notices(folders: dict[str, Path], wrong: str) -> None:
    """Another mask, or another order of examples, is seen: the agreement above is not trivial."""
    base = toy.load(folders["qwen2"])
    trials, tasks = toy.mixed_trials(steps=6)
    trial = trials[3]
    recorder, _ = toy.train(base, [trial], tasks)
    packed = toy.pack(base, [trial.adapter])
    place = Place()
    model, layers = peft_model(folders["qwen2"], base, packed, 0, trial, place)
    if wrong == "mask":
        for layer in layers.values():
            layer.lora_dropout["default"].place = Place(step=99)
    else:
        trial = type(trial)(**{**trial.__dict__, "seed": 77})
    losses = torch.tensor(plain_loop(model, trial, tasks["d"], place), dtype=torch.float64)
    assert not torch.allclose(recorder.losses("d"), losses, rtol=1e-4)
    packed.unpack(base.module)
