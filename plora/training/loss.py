"""Cross-entropy of a packed microbatch, and its gradient, without the full logits.

Shapes: ``T`` packed tokens, ``D`` hidden width, ``V`` vocabulary, ``M`` labelled rows, ``C`` rows of
a chunk, ``K`` slots. The logits of all rows of a microbatch would be the largest tensor of the whole
step (2.5 GB at 8192 rows of a 152k vocabulary in bf16), so ``C`` rows at a time are turned into the
gradient of their hidden states and dropped. No scalar over all adapters is ever formed: each row has
its own weight and adds to its own slot's sum, so one adapter's NaN stays its own.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Callable

import torch

Head = Callable[[torch.Tensor], torch.Tensor]

# Logits held at a time, in elements, and what rows are rounded up to. A GPU's products run at full
# speed from about a thousand rows (of a 152k vocabulary: 30 ms for 8192 rows, the products alone 29);
# on a CPU a chunk should stay near the cache.
_CHUNKS = {"cuda": (1 << 27, 256), "cpu": (1 << 22, 64)}


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Rows ``C`` whose logits are held at a time."""
    elements, step = _CHUNKS.get(device.type, _CHUNKS["cuda"])
    return -(-elements // (vocab_size * step)) * step


def can_compile(device: torch.device) -> bool:
    """Whether ``torch.compile`` has what it needs on this device (Triton and a C compiler)."""
    has_compiler = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None and has_compiler


def forget_compiled(device: torch.device) -> None:
    """Drop what was compiled for a pack that is gone: torch stops compiling a function after eight of such."""
    if can_compile(device):
        torch._dynamo.reset()


def cross_entropy_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each row in fp32: ``logsumexp(logits) - logits[label]``. ``[C, V], [C] -> [C]``."""
    wide = logits.float()
    return torch.logsumexp(wide, dim=-1) - wide.gather(1, labels[:, None]).squeeze(1)


def _eager_chunk(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses ``[C]`` and ``dlogits = weight * (softmax(logits) - onehot(label))`` ``[C, V]``.

    In place on one fp32 copy: eager torch would otherwise hold four.
    """
    wide = logits.to(torch.float32, copy=True)
    picked = wide.gather(1, labels[:, None])
    log_z = torch.logsumexp(wide, dim=-1, keepdim=True)
    wide.sub_(log_z).exp_().scatter_add_(1, labels[:, None], torch.full_like(picked, -1.0)).mul_(weight[:, None])
    return (log_z - picked).squeeze(1), wide.to(logits.dtype)


def _fusable_chunk(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as ``_eager_chunk`` in the form that the compiler fuses into two passes over the logits."""
    wide = logits.float()
    log_z = torch.logsumexp(wide, dim=-1, keepdim=True)
    picked = wide.gather(1, labels[:, None])
    is_label = torch.arange(wide.shape[1], device=wide.device)[None, :] == labels[:, None]
    gradient = ((wide - log_z).exp() - is_label.float()) * weight[:, None]
    return (log_z - picked).squeeze(1), gradient.to(logits.dtype)


@functools.cache
def _compiled_chunk() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(_fusable_chunk, dynamic=True)


def backward_cross_entropy(
    head: Head,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    slots: torch.Tensor,
    n_slots: int,
    *,
    chunk: int,
    compiled: bool = False,
) -> torch.Tensor:
    """Loss of every slot, and one backward pass from it: ``loss[k] = sum_{i in k} weight_i * ce_i``.

    With ``weight = 1 / (label tokens of the adapter's whole batch)`` the sums of a batch's
    microbatches add up to its mean loss, and so do their gradients. Never waits for the device.

    Args:
        head: the frozen output head, ``[C, D] -> [C, V]`` (``BaseModel.logits``).
        hidden: ``[T, D]`` final hidden states, attached to the graph of the adapters.
        rows: int64 ``[M]``, the labelled rows.
        labels: int64 ``[M]``, their labels.
        weight: fp32 ``[M]``, the weight of each row.
        slots: int64 ``[M]``, the slot of each row.
        n_slots: length ``K`` of the result.
        chunk: rows whose logits are held at a time, see `chunk_rows`.
        compiled: fuse the softmax and its gradient with ``torch.compile`` (GPU only pays).

    Returns:
        fp32 ``[K]`` on the device of ``hidden``; slots without rows have zero.
    """
    losses, d_hidden = hidden_gradient(
        head, hidden.detach(), rows, labels, weight, slots, n_slots, chunk=chunk, compiled=compiled
    )
    hidden.backward(d_hidden)
    return losses


def hidden_gradient(
    head: Head,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    slots: torch.Tensor,
    n_slots: int,
    *,
    chunk: int,
    compiled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss sums ``[K]`` and the gradient of ``hidden`` ``[T, D]``; arguments as `backward_cross_entropy`."""
    softmax_gradient = _compiled_chunk() if compiled else _eager_chunk
    sums = torch.zeros(n_slots, dtype=torch.float32, device=hidden.device)
    d_hidden = torch.zeros_like(hidden)
    for start in range(0, len(rows), chunk):
        piece = slice(start, start + chunk)
        x = hidden[rows[piece]].requires_grad_()
        with torch.enable_grad():
            logits = head(x)
        row_losses, d_logits = softmax_gradient(logits.detach(), labels[piece], weight[piece])
        (d_x,) = torch.autograd.grad(logits, x, d_logits)
        d_hidden[rows[piece]] = d_x
        sums.index_add_(0, slots[piece], row_losses * weight[piece])
        del logits, d_logits  # before the next chunk's are made
    return sums, d_hidden


@torch.no_grad()
def token_losses(
    head: Head, hidden: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor, *, chunk: int
) -> torch.Tensor:
    """Cross-entropy of each labelled row without gradient: fp32 ``[M]``, the negative log-likelihood of its label."""
    parts: list[torch.Tensor] = []
    for start in range(0, len(rows), chunk):
        piece = slice(start, start + chunk)
        parts.append(cross_entropy_rows(head(hidden[rows[piece]]), labels[piece]))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float32, device=hidden.device)
