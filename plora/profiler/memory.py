"""What a pack needs in bytes on one device: an analytic model of base, adapters, activations and overhead.

Letters: ``T`` tokens of a microbatch, ``D`` model width, ``F`` feed-forward width, ``Q`` query heads times
head size, ``V`` the same for key (or value) heads, ``e`` bytes of the compute dtype, ``d`` tensor-parallel
degree.

Saved per token and layer for the backward pass (the base is frozen, so a linear layer itself saves nothing;
its input is saved once for the adapters that share it):

=========================  ==============  =====================================================
tensor                     bytes           saved by
=========================  ==============  =====================================================
norm's input, twice        2 * 4 D         RMSNorm computes in fp32, whatever the dtype
norm's output, twice       2 * e D         adapters of q, k, v and of gate, up
q, k, v after rotation     e (Q + 2 V)     attention
attention output           e Q             attention and the adapter of o
log-sum-exp                4 heads         attention
rotary table rows          4 e head_dim    sine and cosine, for q and for k
gate, up, without adapters 2 e F           SwiGLU, which the adapters of gate, up and down ride on
h of each adapted linear   e rank          the adapter's B
=========================  ==============  =====================================================

``compiled`` layers fuse the norms: their input is kept in the compute dtype and their output made again, and so are
the rotary rows that differ between q and k. With activation checkpointing a layer keeps its input alone (``e D``), and
one layer at a time is held in full while it is recomputed. Where only some layers are, that one costs nothing: the last
layer is not among them, and those before it are recomputed when others have been freed.

All that is saved is alive twice: while the loss holds its logits, and when they are gone while the last layer is
differentiated. The larger of the two makes the peak.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from plora.modules.config import ALL_LINEAR, AdapterConfig

if TYPE_CHECKING:
    from plora.models.spec import LinearSpec, ModelSpec

GIB = 1 << 30
MIB = 1 << 20

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
# NF4: half a byte, an int8 scale per 64 values, an fp32 scale of the scales per 256 of them.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes an adapter's parameter takes besides the compute-dtype shadow: fp32 weight and gradient, two moments.
STATE_BYTES = {"exact": 4 + 4 + 4 + 4, "8bit": 4 + 4 + 1 + 1 + 2 * 4 / 256}


class Overhead(NamedTuple):
    """What the allocator and the libraries take on top of the tensors alive."""

    libraries: int  # bytes that libraries hold as tensors: on a GPU cuBLAS, 32 MiB for each thread that calls it
    fixed: int  # bytes beside tensors: kernels' code, small buffers
    fraction: float  # of a microbatch's bytes: blocks that are rounded up or lie idle


OVERHEAD = {"cuda": Overhead(96 * MIB, 256 * MIB, 0.04), "cpu": Overhead(0, 256 * MIB, 0.05)}
# Bytes per token and rank of the packed kernels' workspace (``kernels/schedule.py``), if all tokens were of the largest
# rank.
WORKSPACE_BYTES = 108


@dataclass(frozen=True)
class Saved:
    """Calibration of the analytic model, by what was measured.

    Args:
        activations: factor on the bytes that grow with the microbatch's tokens, logits left out: those are known.
        libraries: bytes that are held whatever the pack is; None for what is usual.
        idle: the allocator's share as a part of a microbatch's bytes; None for what is usual.
    """

    activations: float = 1.0
    libraries: int | None = None
    idle: float | None = None


@dataclass(frozen=True)
class MemoryParts:
    """Predicted bytes of a pack on each of its devices, by part.

    Training and generation do not overlap, so only the larger of them counts; likewise the logits and the gradients
    that are in flight in the backward pass.
    """

    base: int
    adapters: int
    libraries: int
    activations: int
    in_flight: int
    logits: int
    generation: int
    overhead: int

    @property
    def microbatch(self) -> int:
        """Peak bytes of one microbatch's training."""
        return self.activations + max(self.in_flight, self.logits)

    @property
    def allocated(self) -> int:
        """Peak bytes of the tensors alive."""
        return self.base + self.adapters + self.libraries + max(self.microbatch, self.generation)

    @property
    def total(self) -> int:
        """Peak bytes taken from the device, the allocator's share included."""
        return self.allocated + self.overhead

    def describe(self) -> str:
        """One line: ``base weights 14.2 GiB + adapters 650 MiB + ... = 20.1 GiB``."""
        sizes = {"base weights": self.base, "adapters": self.adapters}
        if self.generation > self.microbatch:
            sizes["generation"] = self.generation
        elif self.in_flight > self.logits:
            sizes["activations"] = self.microbatch
        else:
            sizes |= {"activations": self.activations, "logits": self.logits}
        sizes["allocator and libraries"] = self.overhead + self.libraries
        return (
            " + ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
            + f" = {format_bytes(self.total)}"
        )


@dataclass(frozen=True)
class MemoryModel:
    """Bytes a pack needs per device, from the model's dimensions alone.

    ``total(d) = base / d + sum_i adapter_i(d) + libraries + max(microbatch(T), generation) + overhead`` with
    ``microbatch(T) = activations(T) / d + max(in flight(T), logits) / d``.
    Tensor parallelism leaves norms' inputs and outputs (width D) whole on every device and divides the rest.

    Args:
        spec: the base model's dimensions.
        dtype: compute dtype, ``bf16`` or ``fp32``.
        activation_checkpointing: recompute each layer in the backward pass, or this many of them.
        device: ``cuda`` or ``cpu``.
        quantize: ``nf4`` for 4-bit linear layers of the base, or None.
        moments: ``exact`` (fp32) or ``8bit`` optimizer moments.
        loss_chunk: rows of logits computed at a time by the loss.
        compiled: layers and loss are compiled, see the table above.
        graph_tokens: microbatches of up to so many tokens run as CUDA graphs. What the largest of them takes lies in a
            pool of its own, which the allocator holds beside everything else.
        calibration: measured corrections.

    Raises:
        ValueError: for a dtype, device, quantisation or moments that do not exist, more layers than there are, a
            ``loss_chunk`` below one or negative ``graph_tokens``.
    """

    spec: ModelSpec
    dtype: str = "bf16"
    activation_checkpointing: bool | int = False
    device: str = "cuda"
    quantize: str | None = None
    moments: str = "exact"
    loss_chunk: int = 1024
    compiled: bool = False
    graph_tokens: int = 0
    calibration: Saved = Saved()

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dtype", self.dtype, tuple(DTYPE_BYTES)),
            ("device", self.device, tuple(OVERHEAD)),
            ("quantize", self.quantize, (None, "nf4")),
            ("moments", self.moments, tuple(STATE_BYTES)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
        if not 0 <= self.recomputed_layers <= self.spec.num_layers:
            raise ValueError(
                f"activation_checkpointing = {self.activation_checkpointing}: {self.spec.name} has "
                f"{self.spec.num_layers} layers; give at most as many, or true for all"
            )
        if self.loss_chunk < 1:
            raise ValueError(f"loss_chunk must be at least 1 row, got {self.loss_chunk}")
        if self.graph_tokens < 0:
            raise ValueError(f"graph_tokens must not be negative, got {self.graph_tokens}; 0 is for no CUDA graphs")

    @property
    def element(self) -> int:
        """Bytes of one value of the compute dtype."""
        return DTYPE_BYTES[self.dtype]

    @property
    def recomputed_layers(self) -> int:
        """How many layers are recomputed in the backward pass."""
        chosen = self.activation_checkpointing
        return chosen * self.spec.num_layers if isinstance(chosen, bool) else chosen

    def base_bytes(self, degree: int = 1) -> int:
        """Bytes of the frozen base on one of ``degree`` devices: quantised linears, the rest in the compute dtype."""
        spec = self.spec
        linear = spec.num_layers * sum(layer.in_features * layer.out_features for layer in spec.linears)
        rest = max(0, spec.n_params - linear)
        per_linear = NF4_BYTES if self.quantize == "nf4" else self.element
        return int((linear * per_linear + rest * self.element) / degree)

    def adapter_params(self, rank: int, target_modules: str | Sequence[str] = ALL_LINEAR, degree: int = 1) -> int:
        """Parameters of one adapter that a device holds.

        A layer split over its output keeps A whole and a part of B, one split over its input the reverse.

        Raises:
            ValueError: if a target names no linear layer of the model.
        """
        count = 0
        for layer in targeted(self.spec, target_modules):
            whole, split = layer.in_features, layer.out_features
            if layer.parallel == "row":
                whole, split = split, whole
            count += rank * (whole + -(-split // degree))
        return self.spec.num_layers * count

    def adapter_bytes(self, rank: int, target_modules: str | Sequence[str] = ALL_LINEAR, degree: int = 1) -> int:
        """Bytes of one adapter's training state: weight, gradient, two moments and, below fp32, the shadow."""
        shadow = 0 if self.dtype == "fp32" else self.element
        return int(self.adapter_params(rank, target_modules, degree) * (STATE_BYTES[self.moments] + shadow))

    def layer_bytes_per_token(self, max_rank: int = 0, degree: int = 1) -> float:
        """Bytes per token that one layer saves for its backward pass (the table above)."""
        spec, e = self.spec, self.element
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        norm = e if self.compiled else 4 + e
        whole = 2 * norm * spec.dim
        attention = e * (2 * q + 2 * kv) + 4 * spec.num_heads
        rotary = (2 if self.compiled else 4) * e * spec.head_dim
        ffn = 2 * e * spec.ffn_dim
        ranks = e * max_rank * len(spec.linears)
        return whole + rotary + ranks + (attention + ffn) / degree

    def activation_bytes(self, tokens: int, max_rank: int = 0, degree: int = 1) -> int:
        """Bytes that a microbatch saves for its backward pass.

        Args:
            tokens: tokens of the microbatch.
            max_rank: largest rank among the adapters that share it.
            degree: tensor-parallel degree.
        """
        spec, e = self.spec, self.element
        ends = (2 * e + 4) * spec.dim + 32  # embedding, final norm, gradient of the hidden states; token tables
        workspace = WORKSPACE_BYTES * max_rank if self.device == "cuda" else 0
        recomputed = self.recomputed_layers
        layers: float = recomputed * e * spec.dim
        layers += (spec.num_layers - recomputed) * self.layer_bytes_per_token(max_rank, degree)
        return int(tokens * (layers + ends + workspace) * self.calibration.activations)

    def in_flight_bytes(self, tokens: int, max_rank: int = 0, degree: int = 1) -> int:
        """Bytes of what a layer makes while it is differentiated; arguments as `activation_bytes`."""
        # The product of gate and up, its gradient, and theirs.
        in_flight = self.element * 4 * self.spec.ffn_dim / degree
        if self.recomputed_layers == self.spec.num_layers:
            in_flight += self.layer_bytes_per_token(max_rank, degree)
        return int(tokens * in_flight * self.calibration.activations)

    def logits_bytes(self, tokens: int, degree: int = 1, labels: int | None = None) -> int:
        """Bytes of a chunk of logits and its gradient; eager, of two fp32 copies too.

        Args:
            tokens: tokens of the microbatch.
            degree: tensor-parallel degree.
            labels: how many of them are labelled, for only those have logits; None where all may be.
        """
        rows = tokens if labels is None else min(labels, tokens)
        per_logit = 2 * self.element if self.compiled else self.element + 8
        return int(min(rows, self.loss_chunk) * per_logit * self.spec.vocab_size / degree)

    def generation_bytes(self, rows: int, length: int, degree: int = 1) -> int:
        """Bytes of packed generation: the cache of ``rows`` sequences of ``length`` tokens, and their logits."""
        spec = self.spec
        cache = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * self.element / degree
        return int(rows * (length * cache + spec.vocab_size * (self.element + 4)))

    def parts(
        self,
        adapters: Iterable[AdapterConfig],
        tokens: int,
        *,
        degree: int = 1,
        generation: tuple[int, int] = (0, 0),
        labels: int | None = None,
    ) -> MemoryParts:
        """Predicted bytes of a pack on each of its ``degree`` devices.

        Args:
            adapters: the adapters that are alive at the same time.
            tokens: token budget of a microbatch.
            degree: tensor-parallel degree.
            generation: rows and length of packed generation, ``(0, 0)`` for none.
            labels: labelled tokens of the microbatch; None where all may be, as a plan has to assume.
        """
        adapters = list(adapters)
        state = sum(self.adapter_bytes(a.rank, a.target_modules, degree) for a in adapters)
        rank = max((a.rank for a in adapters), default=0)
        return self.parts_from_bytes(state, tokens, rank, degree=degree, generation=generation, labels=labels)

    def parts_from_bytes(
        self,
        adapter_bytes: int,
        tokens: int,
        max_rank: int,
        *,
        degree: int = 1,
        generation: tuple[int, int] = (0, 0),
        labels: int | None = None,
    ) -> MemoryParts:
        """The same from the adapters' summed bytes: what the planner calls many times."""
        usual, measured = OVERHEAD[self.device], self.calibration
        parts = MemoryParts(
            base=self.base_bytes(degree),
            adapters=adapter_bytes,
            libraries=usual.libraries if measured.libraries is None else measured.libraries,
            activations=self.activation_bytes(tokens, max_rank, degree),
            in_flight=self.in_flight_bytes(tokens, max_rank, degree),
            logits=self.logits_bytes(tokens, degree, labels),
            generation=self.generation_bytes(*generation, degree) if generation[0] else 0,
            overhead=0,
        )
        idle = usual.fraction if measured.idle is None else measured.idle
        overhead = usual.fixed + int(idle * max(parts.microbatch, parts.generation))
        return replace(parts, overhead=overhead + self.graph_bytes(tokens, max_rank, degree))

    def graph_bytes(self, tokens: int, max_rank: int, degree: int = 1) -> int:
        """Bytes of the CUDA graphs' pool, if microbatches have up to ``tokens``."""
        tokens = min(tokens, self.graph_tokens)
        transient = max(self.in_flight_bytes(tokens, max_rank, degree), self.logits_bytes(tokens, degree))
        return self.activation_bytes(tokens, max_rank, degree) + transient

    def adapter_room(
        self,
        free_bytes: int,
        tokens: int,
        max_rank: int,
        *,
        degree: int = 1,
        generation: tuple[int, int] = (0, 0),
    ) -> int:
        """Bytes left for adapters beside the base and a microbatch of ``tokens``; negative if these do not fit."""
        return free_bytes - self.parts_from_bytes(0, tokens, max_rank, degree=degree, generation=generation).total


def targeted(spec: ModelSpec, target_modules: str | Sequence[str]) -> list[LinearSpec]:
    """The linear layers (of one decoder layer) that a target list names.

    Raises:
        ValueError: if a name is none of them.
    """
    if isinstance(target_modules, str):
        assert target_modules == ALL_LINEAR, target_modules
        return list(spec.linears)
    names = {layer.name for layer in spec.linears}
    unknown = sorted(set(target_modules) - names)
    if unknown:
        raise ValueError(
            f"target_modules names {', '.join(unknown)}, but {spec.name} has {', '.join(sorted(names))}: "
            "use these names, or all-linear"
        )
    return [layer for layer in spec.linears if layer.name in set(target_modules)]


def format_bytes(size: float) -> str:
    """Bytes as people read them: ``14.2 GiB``, ``650 MiB``."""
    if abs(size) >= GIB:
        return f"{size / GIB:.1f} GiB"
    return f"{size / MIB:.0f} MiB" if abs(size) >= 10 * MIB else f"{size / MIB:.2g} MiB"
