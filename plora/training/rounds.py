"""The device's share of a round: gradients of whole batches, and the numbers that come back late.

Nothing here waits for the device, but for the capture of a CUDA graph; `Readback.wait` does, one round later.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import torch

from plora.data.microbatch import pack
from plora.data.types import Example, Microbatch
from plora.models.base import BaseModel
from plora.modules.config import computed_rank
from plora.modules.packed import PackedAdapters
from plora.training.graphs import MicrobatchGraphs, differentiate
from plora.training.inputs import Inputs


def batch_gradients(
    base: BaseModel,
    packed: PackedAdapters,
    batches: Mapping[int, Sequence[Example]],
    steps: Mapping[int, int],
    token_budget: int,
    *,
    compile_loss: bool = False,
    graphs: MicrobatchGraphs | None = None,
) -> tuple[torch.Tensor, int]:
    """Put the gradients of one whole batch per slot into the arena, in place of what was there.

    Args:
        base: the base model.
        packed: the adapters on it.
        batches: the batch of each slot.
        steps: the step of each slot, which keys its dropout.
        token_budget: most tokens of a microbatch.
        compile_loss: see `backward_cross_entropy`.
        graphs: runs the microbatches that it takes.

    Returns:
        Each slot's mean loss over the label tokens of its batch, fp32 ``[K]``, and the number of microbatches.
    """
    n_labels = {slot: sum(example.n_labels for example in batch) for slot, batch in batches.items()}
    losses = torch.zeros(packed.capacity, device=base.device)
    microbatches, fresh = pack(batches, token_budget), set(batches)
    for microbatch in microbatches:
        begun = fresh & microbatch.slot_tokens.keys()
        fresh -= begun
        if graphs is not None and graphs.takes(microbatch):
            losses += graphs.forward_backward(microbatch, n_labels, steps, replace=begun)
        else:
            losses += forward_backward(
                base, packed, microbatch, n_labels, steps, compile_loss=compile_loss, replace=begun
            )
    return losses, len(microbatches)


def work_of(packed: PackedAdapters, batches: Mapping[int, Sequence[Example]]) -> dict[str, int]:
    """What a round of these batches consists of, as the cost model counts it.

    Returns:
        ``tokens``, ``token_rank`` (tokens times computed rank), ``labels``, ``squares`` (of the lengths of
        the ``sequences``), and of the slots that take part ``adapters`` and their ``params``.
    """
    work = dict.fromkeys(("tokens", "token_rank", "labels", "squares", "sequences", "adapters", "params"), 0)
    adapters = packed.adapters
    for slot, batch in batches.items():
        lengths = [len(example) for example in batch]
        work["tokens"] += sum(lengths)
        work["token_rank"] += sum(lengths) * computed_rank(adapters[slot].config.rank)
        work["labels"] += sum(example.n_labels for example in batch)
        work["squares"] += sum(length * length for length in lengths)
        work["sequences"] += len(lengths)
        work["adapters"] += 1
        work["params"] += adapters[slot].layout.numel
    return work


def forward_backward(
    base: BaseModel,
    packed: PackedAdapters,
    microbatch: Microbatch,
    n_labels: Mapping[int, int],
    steps: Mapping[int, int],
    *,
    compile_loss: bool = False,
    replace: Collection[int] = (),
) -> torch.Tensor:
    """Add a microbatch's gradients to the arena and return its share of each slot's loss, fp32 ``[K]``.

    Args:
        base: the base model.
        packed: the adapters on it.
        microbatch: on the host.
        n_labels: label tokens in each slot's whole batch, by which its losses are divided.
        steps: the step of each slot, which keys its dropout.
        compile_loss: see `backward_cross_entropy`.
        replace: slots whose gradients this microbatch's take the place of.
    """
    inputs = Inputs.of(microbatch, n_labels).to(base.device)
    with packed.route(
        microbatch.slot_tokens, token_index=inputs.token_index, steps=steps, dropout=True, replace=replace
    ):
        return differentiate(base, packed, inputs, compile_loss=compile_loss)


class Readback:
    """Numbers on their way from the device to the host, behind the work that makes them.

    Make it before that work is queued, hand it the values after, and wait later.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._started = self._mark()

    def send(self, values: torch.Tensor) -> None:
        """Begin to copy ``values``; does not wait."""
        if self._is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
        else:
            self._host = values.clone()
        self._ended = self._mark()

    def wait(self) -> tuple[list[list[float]], float]:
        """The values, and the seconds that the device spent from when this was made."""
        if isinstance(self._started, torch.cuda.Event) and isinstance(self._ended, torch.cuda.Event):
            self._ended.synchronize()
            return self._host.tolist(), self._started.elapsed_time(self._ended) / 1000
        return self._host.tolist(), self._ended - self._started  # type: ignore[operator]

    def _mark(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
