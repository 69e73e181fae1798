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


class TorchtuneLoRA:
    """A training step of torchtune's LoRA recipe, ``lora_finetune_single_device``: one adapter, random bf16 weights.

    Args:
        config: of a Qwen2.5 model.
        rank: of the adapter, on all seven linears.
        recompute: activation checkpointing, as the recipe is shipped.
        compiled: layers and loss compiled, which the recipe offers.
        device: where it trains.
    """

    def __init__(
        self, config: Mapping[str, Any], rank: int, *, recompute: bool, compiled: bool, device: str = "cuda"
    ) -> None:
        from torchtune import training
        from torchtune.models.qwen2 import lora_qwen2
        from torchtune.modules import TransformerSelfAttentionLayer
        from torchtune.modules.loss import CEWithChunkedOutputLoss
        from torchtune.modules.peft import get_adapter_params, set_trainable_params

        with torch.device(device), training.set_default_dtype(torch.bfloat16):
            self.model = lora_qwen2(
                ["q_proj", "k_proj", "v_proj", "output_proj"],
                apply_lora_to_mlp=True,
                vocab_size=config["vocab_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                num_kv_heads=config["num_key_value_heads"],
                embed_dim=config["hidden_size"],
                intermediate_dim=config["intermediate_size"],
                max_seq_len=8192,
                norm_eps=config["rms_norm_eps"],
                tie_word_embeddings=config["tie_word_embeddings"],
                lora_rank=rank,
                lora_alpha=2 * rank,
            )
        set_trainable_params(self.model, get_adapter_params(self.model))
        if recompute:
            training.set_activation_checkpointing(self.model, auto_wrap_policy={TransformerSelfAttentionLayer})
        self.loss = CEWithChunkedOutputLoss()
        if compiled:
            training.compile_model(self.model, verbose=False)
            training.compile_loss(self.loss, verbose=False)
        self.model.set_num_output_chunks(self.loss.num_output_chunks)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True)

    def forward_backward(self, tokens: torch.Tensor, length: int) -> None:
        """Gradients of ``tokens [b, s]``: rows of one sequence, or packed ones of ``length`` tokens each."""
        from torchtune.modules.attention_utils import packed_block_causal_mask

        self.optimizer.zero_grad()
        mask, positions = None, None
        if tokens.shape[1] > length:
            count = tokens.shape[1] // length
            mask = packed_block_causal_mask([torch.full((count,), length)] * len(tokens))
            positions = torch.arange(length, device=tokens.device).repeat(count).expand_as(tokens)
        logits = self.model(tokens=tokens, mask=mask, input_pos=positions)
        ignored = torch.full((len(tokens), 1), self.loss.ignore_index, device=tokens.device)
        loss = self.loss(logits, torch.hstack((tokens[:, 1:], ignored)))
        del logits
        loss.backward()


def peft_model(config: Mapping[str, Any], rank: int, *, fp32: bool) -> nn.Module:
    """A Hugging Face model of this configuration with random bf16 weights and one peft adapter, on the GPU.

    ``fp32`` adapters are peft's default, and computed in fp32.
    """
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
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=fp32).train()
