"""AdamW over the arena: every adapter with its own rate, decay, clip, step count and skip flag.

On CUDA the kernels of ``plora.kernels.adamw`` step all adapters in three launches. Elsewhere, and without the
extension, each adapter's range is updated by torch's fused AdamW, which divides the gradient by ``grad_scale`` (the
clip) and leaves everything untouched where ``found_inf`` is one (the skip). Both are tensors on the device, so a step
never waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from plora.kernels import adamw
from plora.kernels.dispatch import backend
from plora.modules.adapter import Adapter
from plora.modules.packed import PackedAdapters
from plora.training.moments import EightBitMoments, ExactMoments, Moments

OPTIMIZER_STATES = ("exact", "8bit")

# Elements whose squares are added in one go. On a CPU torch adds tens of millions of squares in
# fp32 one after the other and is off by 0.5%; the norm of the blocks' norms is exact to 1e-7.
_NORM_BLOCK = 4096


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW's settings of one adapter, those that stay the same over its training.

    Args:
        betas: decay rates of the first and second moment.
        eps: guard of the denominator.
        weight_decay: decoupled decay.
        max_grad_norm: threshold of the adapter's gradient norm; None switches clipping off.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None

    @property
    def limit(self) -> float:
        """The threshold as a number, infinite where clipping is off."""
        return math.inf if self.max_grad_norm is None else self.max_grad_norm


@dataclass(frozen=True)
class StepOutcome:
    """What a step did, on the device: fp32 ``[K]`` over the slots, zero for those that did not step.

    Args:
        grad_norm: norm of the adapter's gradient before clipping.
        skipped: 1 where loss or norm was not finite, so that nothing was changed.
    """

    grad_norm: torch.Tensor
    skipped: torch.Tensor


class PackedAdamW:
    """Decoupled AdamW (arXiv 1711.05101) for each adapter of a pack by itself.

    ``m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
    w = w - lr (decay w + m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps))``

    with ``g`` scaled by ``min(1, max_grad_norm / (|g| + 1e-6))`` and ``t`` the adapter's own count of
    updates that were not skipped: ``torch.nn.utils.clip_grad_norm_`` and ``torch.optim.AdamW``.

    Args:
        packed: the adapters.
        state: ``exact``, fp32 moments in the pack's arena, or ``8bit``, see ``moments``: 2 bytes a
            parameter instead of 8.

    Raises:
        ValueError: for a state that does not exist.
    """

    def __init__(self, packed: PackedAdapters, state: str = "exact") -> None:
        if state not in OPTIMIZER_STATES:
            raise ValueError(f"state must be one of {', '.join(OPTIMIZER_STATES)}, got {state!r}")
        self.packed = packed
        self._moments: Moments = EightBitMoments() if state == "8bit" else ExactMoments(packed.arena)
        self._configs: dict[int, AdamWConfig] = {}
        self._counts = torch.zeros(packed.capacity, device=packed.arena.device)

    def add(self, slot: int, config: AdamWConfig) -> None:
        """Begin to update ``slot``, with fresh moments and count."""
        self._configs[slot] = config
        missing = self.packed.capacity - len(self._counts)
        if missing:
            self._counts = torch.cat((self._counts, self._counts.new_zeros(missing)))
        self._counts[slot] = 0
        self._moments.add(self.packed.adapters[slot])

    def remove(self, slot: int) -> None:
        """Forget ``slot``; exact moments go with its range when the pack removes it."""
        del self._configs[slot]
        self._moments.remove(slot)

    @torch.no_grad()
    def step(self, rates: Mapping[int, tuple[float, float]], losses: torch.Tensor) -> StepOutcome:
        """Update the adapters in ``rates`` from the arena's gradients; the shadow follows.

        Args:
            rates: slot -> learning rates of A and of B. Only slots whose batch is complete.
            losses: fp32 ``[K]`` on the device, looked at only for being finite.
        """
        if not rates:
            return StepOutcome(torch.zeros_like(losses), torch.zeros_like(losses))
        outcome = self._step_by_kernel(rates, losses) if self._has_kernel else self._step_in_torch(rates, losses)
        return StepOutcome(*outcome)

    def state(self, slot: int) -> dict[str, torch.Tensor]:
        """Copies of what holds the moments of ``slot`` and of its count, on the host: to park it or to resume later."""
        live = self._moments.tensors(self.packed.adapters[slot]) | {"step": self._counts[slot]}
        return {name: tensor.to("cpu", copy=True) for name, tensor in live.items()}

    def load_state(self, slot: int, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what ``state`` returned, into the same or another slot of an adapter of the same shape.

        Raises:
            ValueError: if the state is of an adapter of another size, or of moments of another kind.
        """
        live = self._moments.tensors(self.packed.adapters[slot])
        for name, target in live.items():
            if name not in state or state[name].dtype != target.dtype:
                raise ValueError(
                    f"optimizer state {name} is missing or of another type: it was saved with "
                    "another optimizer_state (exact or 8bit) than this optimizer has"
                )
            if state[name].shape != target.shape:
                raise ValueError(
                    f"optimizer state {name} has {state[name].numel()} elements, but the adapter in slot {slot} "
                    f"has {target.numel()}: it was saved from an adapter of another rank or other target modules"
                )
        for name, target in live.items():
            target.copy_(state[name])
        self._counts[slot] = state["step"]

    @property
    def _has_kernel(self) -> bool:
        arena = self.packed.arena
        return (
            arena.device.type == "cuda" and arena.dtype in (torch.bfloat16, torch.float32) and backend().name == "cuda"
        )

    def _step_by_kernel(self, rates: Mapping[int, tuple[float, float]], losses: torch.Tensor) -> torch.Tensor:
        arena, adapters = self.packed.arena, self.packed.adapters
        updates = []
        for slot, (lr_a, lr_b) in rates.items():
            adapter, config = adapters[slot], self._configs[slot]
            moments = self._moments.tensors(adapter)
            updates.append(
                adamw.Update(
                    slot=slot,
                    start=adapter.start,
                    a_numel=adapter.layout.a_numel,
                    numel=adapter.layout.numel,
                    lr_a=lr_a,
                    lr_b=lr_b,
                    betas=config.betas,
                    eps=config.eps,
                    weight_decay=config.weight_decay,
                    max_norm=config.limit,
                    exp_avg=moments["exp_avg"],
                    exp_avg_sq=moments["exp_avg_sq"],
                    scales=moments.get("scales"),
                )
            )
        shadow = None if arena.shadow is arena.weight else arena.shadow
        codebook = self._moments.codebook(arena.device)
        return adamw.update(arena.weight, arena.grad, shadow, updates, losses, self._counts, codebook)

    def _step_in_torch(self, rates: Mapping[int, tuple[float, float]], losses: torch.Tensor) -> torch.Tensor:
        grad, adapters = self.packed.arena.grad, self.packed.adapters
        outcome = losses.new_zeros(2, len(losses))
        norms, skipped = outcome
        slots = torch.tensor(list(rates)).to(losses.device, non_blocking=True)
        norms[slots] = torch.stack([_norm(grad[adapters[slot].range]) for slot in rates])
        skipped[slots] = (~torch.isfinite(norms + losses))[slots].float()
        for slot, (lr_a, lr_b) in rates.items():
            self._update(adapters[slot], lr_a, lr_b, norms[slot], skipped[slot])
        self.packed.refresh()
        return outcome

    def _update(self, adapter: Adapter, lr_a: float, lr_b: float, norm: torch.Tensor, skipped: torch.Tensor) -> None:
        config, arena, count = self._configs[adapter.slot], self.packed.arena, self._counts[adapter.slot]
        scale = ((norm + 1e-6) / config.limit).clamp(min=1.0)
        count += 1 - skipped

        def step(span: slice, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> None:
            # A list of one: the fused kernel takes one rate per call, and adapters differ in theirs.
            torch._fused_adamw_(
                [arena.weight[span]],
                [arena.grad[span]],
                [exp_avg],
                [exp_avg_sq],
                [],
                [count],
                lr=lr_a if span.start < adapter.b_range.start else lr_b,
                beta1=config.betas[0],
                beta2=config.betas[1],
                weight_decay=config.weight_decay,
                eps=config.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=skipped,
            )

        self._moments.update(adapter, step, skipped)


def _norm(flat: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of a flat tensor, accurate at any length."""
    whole = len(flat) // _NORM_BLOCK * _NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_BLOCK), dim=1)
    return torch.linalg.vector_norm(torch.cat((blocks, torch.linalg.vector_norm(flat[whole:])[None])))
