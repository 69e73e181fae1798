"""A small model with the layers that matter: shared inputs, a bias, a frozen embedding before layer 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, DIM, HIDDEN = 11, 16, 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(DIM, DIM)
        self.k_proj = nn.Linear(DIM, DIM, bias=False)
        self.up_proj = nn.Linear(DIM, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.q_proj(x)) * self.k_proj(x)
        return x + self.down_proj(F.silu(self.up_proj(x)))


class Toy(nn.Module):
    def __init__(self, layers: int = 3, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def tokens(n: int) -> torch.Tensor:
    return (torch.arange(n) * 7) % VOCAB


def loss(logits: torch.Tensor) -> torch.Tensor:
    """Uneven over rows and columns, so that a swapped row or a transposed factor shows."""
    weight = torch.linspace(0.5, 1, logits.numel()).view_as(logits)
    return (logits.sin() * weight).sum()


def randomise(packed, std: float = 0.05) -> None:  # type: ignore[no-untyped-def]
    """Give B values, which are zero after initialisation."""
    for slot, adapter in packed.adapters.items():
        with torch.no_grad():
            adapter.B.normal_(0, std, generator=torch.Generator().manual_seed(slot))
