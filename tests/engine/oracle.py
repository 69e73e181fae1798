"""What peft and transformers make of an exported adapter, and what the packed model makes of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from plora.checkpoint.layout import SweepLayout
from plora.data.types import Example
from plora.engine.recorder import load_factors
from plora.models import PackedSequences, from_pretrained
from plora.modules.packed import pack_adapters
from plora.search.trial import Trial


def peft_model(model: Path, adapter: Path | None) -> torch.nn.Module:
    """The Hugging Face model, with the adapter where one is given."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return base if adapter is None else PeftModel.from_pretrained(base, adapter).eval()


@torch.no_grad()
def logits(model: torch.nn.Module, example: Example) -> torch.Tensor:
    return model(input_ids=torch.from_numpy(example.inputs).long()[None]).logits[0]


def loss(model: torch.nn.Module, examples: Sequence[Example]) -> float:
    """Mean cross-entropy over label tokens."""
    rows = torch.cat([logits(model, example) for example in examples])
    labels = torch.cat([torch.from_numpy(example.labels).long() for example in examples])
    return torch.nn.functional.cross_entropy(rows, labels, ignore_index=-100).item()


@torch.no_grad()
def packed_logits(model: Path, layout: SweepLayout, trial: Trial, example: Example) -> torch.Tensor:
    """From the exact weights that the sweep saved, in plora's own model."""
    base = from_pretrained(model, dtype="fp32")
    packed = pack_adapters(base.module, [trial.adapter])
    packed.adapters[0].load_factors(load_factors(layout, trial))
    tokens = torch.from_numpy(example.inputs).long()
    with packed.route([len(tokens)], dropout=False):
        sequences = PackedSequences.from_lengths([len(tokens)], base.device)
        return base.logits(base.hidden_states(tokens, torch.arange(len(tokens)), sequences))
