"""What plora is measured against: the same training by other means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from plora.modules.targets import find_targets


class BmmLinear(nn.Module):
    """A frozen linear with one batched product per rank, each adapter on an equal share of the tokens.

    Args:
        base: the frozen linear.
        ranks: rank of each adapter, ascending.
    """

    def __init__(self, base: nn.Linear, ranks: Sequence[int]) -> None:
        super().__init__()
        self.base, self.n = base, len(ranks)
        self.counts = [len(list(group)) for _, group in groupby(ranks)]
        options = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.a = nn.ParameterList(
            nn.Parameter(torch.randn(n, base.in_features, rank, **options) / base.in_features**0.5)
            for n, rank in zip(self.counts, sorted(set(ranks)), strict=True)
        )
        self.b = nn.ParameterList(
            nn.Parameter(torch.zeros(n, rank, base.out_features, **options))
            for n, rank in zip(self.counts, sorted(set(ranks)), strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., D]`` whose rows divide evenly among the adapters, to ``[..., N]``."""
        y = self.base(x)
        parts = x.reshape(self.n, -1, x.shape[-1]).split(self.counts)
        products = [torch.bmm(torch.bmm(part, a), b) for part, a, b in zip(parts, self.a, self.b, strict=True)]
        return y + 2.0 * torch.cat(products).reshape(y.shape)


class BmmAdapters(nn.Module):
    """``BmmLinear`` in place of every linear layer of a model but the output head."""

    def __init__(self, model: nn.Module, ranks: Sequence[int]) -> None:
        super().__init__()
        self.paths = [target.path for target in find_targets(model)]
        model.requires_grad_(False)
        self.linears = nn.ModuleList(BmmLinear(model.get_submodule(path), sorted(ranks)) for path in self.paths)
        for path, linear in zip(self.paths, self.linears, strict=True):
            linear.base.requires_grad_(False)
            model.set_submodule(path, linear)

    def parameters(self, recurse: bool = True) -> Any:
        """The adapters' alone."""
        return [p for name, p in self.named_parameters() if ".base." not in name]

    def restore(self, model: nn.Module) -> None:
        """Put the frozen layers back."""
        for path, linear in zip(self.paths, self.linears, strict=True):
            model.set_submodule(path, linear.base)


def peft_model(config: Mapping[str, Any], rank: int) -> nn.Module:
    """A Hugging Face model of this configuration with random bf16 weights and one peft adapter, on the GPU."""
    import peft
    import transformers

    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            settings, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linears, task_type="CAUSAL_LM")
    model.gradient_checkpointing_disable()
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=False).train()
