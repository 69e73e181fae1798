"""One flat stretch of memory for all adapters of a pack: weights, gradients and what goes with them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

ALIGNMENT = 64  # elements, so that every factor starts on a 128-byte line in bf16


def aligned(numel: int) -> int:
    """``numel`` rounded up to the alignment."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


class Arena:
    """Parallel flat tensors of equal length, and which ranges of them are taken.

    ``weight`` and ``grad`` are fp32. ``shadow`` is the weight in the compute dtype, and is the
    weight itself where that is fp32. ``attach`` adds further ones, such as an optimizer's moments.
    Elements that no adapter owns are zero in all of them.

    Args:
        numel: initial length in elements.
        device: where the tensors live.
        dtype: compute dtype.
    """

    def __init__(self, numel: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._flats: dict[str, torch.Tensor] = {}
        self._free: list[tuple[int, int]] = [(0, numel)]
        self.numel = numel
        self.attach("weight")
        self.attach("grad")
        self._make_shadow()

    @property
    def weight(self) -> torch.Tensor:
        """fp32 ``[numel]``."""
        return self._flats["weight"]

    @property
    def grad(self) -> torch.Tensor:
        """fp32 ``[numel]``."""
        return self._flats["grad"]

    def attach(self, name: str) -> torch.Tensor:
        """The flat fp32 tensor ``name``, made of zeros on first use; it moves and grows with the arena."""
        if name not in self._flats:
            self._flats[name] = torch.zeros(self.numel, device=self.device)
        return self._flats[name]

    def flats(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of every fp32 flat."""
        yield from self._flats.items()

    def allocate(self, numel: int) -> int:
        """Reserve an aligned range (first fit, growing if need be) and return its start."""
        size = aligned(numel)
        for i, (start, length) in enumerate(self._free):
            if length >= size:
                self._free[i : i + 1] = [(start + size, length - size)] if length > size else []
                return start
        self._grow(size)
        return self.allocate(numel)

    def fits(self, numel: int) -> bool:
        """Whether a range of this length is free without growing."""
        return any(length >= aligned(numel) for _, length in self._free)

    def release(self, start: int, numel: int) -> None:
        """Give a range back and zero it everywhere."""
        size = aligned(numel)
        for _, flat in self.flats():
            flat[start : start + size].zero_()
        self.shadow[start : start + size].zero_()
        merged: list[tuple[int, int]] = []
        for begin, length in sorted([*self._free, (start, size)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((begin, length))
        self._free = merged

    def refresh(self, span: slice = slice(None)) -> None:
        """Copy the weights of ``span`` into the shadow."""
        if self.shadow is not self.weight:
            self.shadow[span].copy_(self.weight[span])

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """Take everything to another device or compute dtype."""
        self.device, self.dtype = device, dtype
        self._flats = {name: flat.to(device) for name, flat in self._flats.items()}
        self._make_shadow()

    def _grow(self, size: int) -> None:
        # Doubling keeps the copies of a pack that only ever grows linear in all.
        extra = max(size, self.numel)
        for name, flat in self._flats.items():
            self._flats[name] = torch.cat((flat, flat.new_zeros(extra)))
        self._free.append((self.numel, extra))
        self.numel += extra
        self._make_shadow()

    def _make_shadow(self) -> None:
        self.shadow = self.weight if self.dtype == torch.float32 else self.weight.to(self.dtype)
