"""One adapter of a pack: its place in the arena and its two parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from plora.kernels.dropout import combine
from plora.modules.arena import Arena, aligned
from plora.modules.config import AdapterConfig
from plora.modules.targets import Target


@dataclass(frozen=True)
class Factor:
    """Where one layer's A or B lies, relative to the adapter's start; ``[rank, width]``, row-major."""

    start: int
    width: int


@dataclass(frozen=True)
class Layout:
    """An adapter's range: A row-parallel, A column-parallel, B row-parallel, B column-parallel.

    The two middle blocks are those that tensor parallelism replicates, so that they are reduced
    and counted once, as one range. B is stored transposed, so rank rows are contiguous in both.
    """

    a: Mapping[str, Factor]
    b: Mapping[str, Factor]
    a_numel: int
    numel: int

    @classmethod
    def of(cls, targets: Sequence[Target], rank: int) -> Layout:
        """The layout of an adapter of ``rank`` over ``targets``."""
        ordered = sorted(targets, key=lambda target: not target.row_parallel)
        a, end = _place(ordered, [target.in_features for target in ordered], rank, 0)
        b, numel = _place(ordered, [target.out_features for target in ordered], rank, end)
        return cls(a, b, end, numel)


def _place(targets: Sequence[Target], widths: Sequence[int], rank: int, start: int) -> tuple[dict[str, Factor], int]:
    factors = {}
    for target, width in zip(targets, widths, strict=True):
        factors[target.path] = Factor(start, width)
        start += aligned(rank * width)
    return factors, start


class Adapter(nn.Module):
    """One LoRA adapter of a pack, as two parameters over the pack's arena.

    ``A`` and ``B`` hold all layers' factors, flat; their gradients are the arena's. Any elementwise
    torch optimizer can train them, in a parameter group or an optimizer of their own.

    Args:
        slot: its place in the pack's tables.
        config: its settings.
        targets: the layers it adapts.
        arena: where it lives.
    """

    def __init__(self, slot: int, config: AdapterConfig, targets: Sequence[Target], arena: Arena) -> None:
        super().__init__()
        self.slot, self.config = slot, config
        self.layout = Layout.of(targets, config.rank)
        self.start = arena.allocate(self.layout.numel)
        self._arena = arena
        self.A, self.B = (nn.Parameter(arena.weight[span]) for span in (self.a_range, self.b_range))
        self.tie()
        self._initialise(targets)

    def tie(self) -> None:
        """Point the parameters at the arena's memory, as after it moved or grew.

        The parameters stay the same objects: optimizers hold on to them.
        """
        for parameter, span in ((self.A, self.a_range), (self.B, self.b_range)):
            parameter.grad = None
            parameter.data = self._arena.weight[span]
            parameter.grad = self._arena.grad[span]

    def leave(self) -> None:
        """Let go of the arena's memory, which the next adapter may take.

        An optimizer that still holds the parameters finds no gradient, so it leaves that adapter alone.
        """
        for parameter in (self.A, self.B):
            parameter.grad = None
            parameter.data = parameter.data.new_empty(0)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # `assign=True` would put other parameters in place of those over the arena, which nothing would then train.
        copied = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, copied, *args)

    def attach_gradients(self) -> None:
        """Give back a gradient that ``zero_grad`` has dropped, as zeros."""
        for parameter, span in ((self.A, self.a_range), (self.B, self.b_range)):
            if parameter.grad is None:
                parameter.grad = self._arena.grad[span].zero_()

    @property
    def range(self) -> slice:
        """All of the adapter's elements in the arena."""
        return slice(self.start, self.start + self.layout.numel)

    @property
    def a_range(self) -> slice:
        """The elements of the A factors."""
        return slice(self.start, self.start + self.layout.a_numel)

    @property
    def b_range(self) -> slice:
        """The elements of the B factors."""
        return slice(self.start + self.layout.a_numel, self.start + self.layout.numel)

    def factors(self, flat: torch.Tensor | None = None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Views of A ``[r, in]`` and B ``[out, r]`` by module path.

        Args:
            flat: one of the arena's flat tensors; the fp32 weight if absent.

        Raises:
            ValueError: if the adapter was removed: its memory is no longer its own.
        """
        if not self.A.numel():
            raise ValueError(f"the adapter of slot {self.slot} was removed from its pack: take its factors before that")
        flat = self._arena.weight if flat is None else flat
        return {
            path: (self._view(flat, a), self._view(flat, self.layout.b[path]).T) for path, a in self.layout.a.items()
        }

    @torch.no_grad()
    def load_factors(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Overwrite the weights, by module path, with A ``[r, in]`` and B ``[out, r]``.

        Raises:
            ValueError: if the paths or shapes are not exactly this adapter's.
        """
        own = self.factors()
        if own.keys() != factors.keys():
            odd = sorted(own.keys() ^ factors.keys())
            raise ValueError(f"the factors are not for the layers of this adapter: {', '.join(odd[:4])} differ")
        for path, pair in own.items():
            for name, mine, theirs in zip("AB", pair, factors[path], strict=True):
                if mine.shape != theirs.shape:
                    raise ValueError(f"{name} of {path} has shape {list(theirs.shape)}, expected {list(mine.shape)}")
                mine.copy_(theirs)
        self._arena.refresh(self.range)

    def _view(self, flat: torch.Tensor, factor: Factor) -> torch.Tensor:
        start = self.start + factor.start
        return flat[start : start + self.config.rank * factor.width].view(self.config.rank, factor.width)

    @torch.no_grad()
    def _initialise(self, targets: Sequence[Target]) -> None:
        """A uniform in +-1/sqrt(in_features) as in peft, B zero; each layer from its own seed.

        Drawn on the CPU, so that a seed means the same adapter on every device and in every pack.
        """
        factors = self.factors()
        for target in targets:
            generator = torch.Generator().manual_seed(combine(self.config.seed, *target.path.encode()) & (2**63 - 1))
            bound = 1 / math.sqrt(target.in_features)
            drawn = torch.empty(self.config.rank, target.in_features).uniform_(-bound, bound, generator=generator)
            factors[target.path][0].copy_(drawn)
