"""AdamW over the arena: every adapter with its own rate, decay, clip, step count and skip flag.

The update of one adapter is one or two launches over its contiguous range, in place, with no
temporary of its size: torch's fused AdamW kernel reads views of the range, divides the gradient by
``grad_scale`` (the clip) and leaves everything untouched where ``found_inf`` is one (the skip). Both
are tensors on the device, so a step never waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from plora.modules.adapter import Adapter
from plora.modules.packed import PackedAdapters

MOMENTS = ("exp_avg", "exp_avg_sq")

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
    updates that were not skipped: ``torch.nn.utils.clip_grad_norm_`` and ``torch.optim.AdamW``. A
    step leaves the clipped gradient in the arena.

    Args:
        packed: the adapters; their moments live in its arena.
    """

    def __init__(self, packed: PackedAdapters) -> None:
        self.packed = packed
        self._configs: dict[int, AdamWConfig] = {}
        self._counts: dict[int, torch.Tensor] = {}

    def add(self, slot: int, config: AdamWConfig) -> None:
        """Begin to update ``slot``, with fresh moments and count."""
        adapter = self.packed.adapters[slot]
        self._configs[slot] = config
        self._counts[slot] = torch.zeros((), device=self.packed.arena.device)
        for name in MOMENTS:
            self.packed.arena.attach(name)[adapter.range] = 0

    def remove(self, slot: int) -> None:
        """Forget ``slot``; its moments go with its range when the pack removes it."""
        del self._configs[slot], self._counts[slot]

    @torch.no_grad()
    def step(self, rates: Mapping[int, tuple[float, float]], losses: torch.Tensor) -> StepOutcome:
        """Update the adapters in ``rates`` from the arena's gradients, then refresh the pack's shadow.

        Args:
            rates: slot -> learning rates of A and of B. Only slots whose batch is complete.
            losses: fp32 ``[K]`` on the device, looked at only for being finite.
        """
        grad, adapters = self.packed.arena.grad, self.packed.adapters
        norms, skipped = torch.zeros_like(losses), torch.zeros_like(losses)
        if not rates:
            return StepOutcome(norms, skipped)
        slots = torch.tensor(list(rates)).to(losses.device, non_blocking=True)
        norms[slots] = torch.stack([_norm(grad[adapters[slot].range]) for slot in rates])
        skipped[slots] = (~torch.isfinite(norms + losses))[slots].float()
        for slot, (lr_a, lr_b) in rates.items():
            self._update(adapters[slot], lr_a, lr_b, norms[slot], skipped[slot])
        self.packed.refresh()
        return StepOutcome(norms, skipped)

    def state(self, slot: int) -> dict[str, torch.Tensor]:
        """Copies of the moments ``[numel]`` of ``slot`` and its count, on the host: to park it or to resume later."""
        span = self.packed.adapters[slot].range
        moments = {name: self.packed.arena.attach(name)[span].to("cpu", copy=True) for name in MOMENTS}
        return {**moments, "step": self._counts[slot].to("cpu", copy=True)}

    def load_state(self, slot: int, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what ``state`` returned, into the same or another slot of an adapter of the same shape.

        Raises:
            ValueError: if the state belongs to an adapter of another size.
        """
        span = self.packed.adapters[slot].range
        for name in MOMENTS:
            target = self.packed.arena.attach(name)[span]
            if state[name].shape != target.shape:
                raise ValueError(
                    f"optimizer state {name} has {state[name].numel()} elements, but the adapter in slot {slot} "
                    f"has {target.numel()}: it was saved from an adapter of another rank or other target modules"
                )
            target.copy_(state[name])
        self._counts[slot].copy_(state["step"])

    def _update(self, adapter: Adapter, lr_a: float, lr_b: float, norm: torch.Tensor, skipped: torch.Tensor) -> None:
        config, arena, count = self._configs[adapter.slot], self.packed.arena, self._counts[adapter.slot]
        limit = float("inf") if config.max_grad_norm is None else config.max_grad_norm
        scale = ((norm + 1e-6) / limit).clamp(min=1.0)
        spans = [(adapter.range, lr_a)] if lr_a == lr_b else [(adapter.a_range, lr_a), (adapter.b_range, lr_b)]
        exp_avg, exp_avg_sq = (arena.attach(name) for name in MOMENTS)
        count += 1 - skipped
        for span, lr in spans:
            # A list of one: the fused kernel takes one rate per call, and adapters differ in theirs.
            torch._fused_adamw_(
                [arena.weight[span]],
                [arena.grad[span]],
                [exp_avg[span]],
                [exp_avg_sq[span]],
                [],
                [count],
                lr=lr,
                beta1=config.betas[0],
                beta2=config.betas[1],
                weight_decay=config.weight_decay,
                eps=config.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=skipped,
            )


def _norm(flat: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of a flat tensor, accurate at any length."""
    whole = len(flat) // _NORM_BLOCK * _NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_BLOCK), dim=1)
    return torch.linalg.vector_norm(torch.cat((blocks, torch.linalg.vector_norm(flat[whole:])[None])))
