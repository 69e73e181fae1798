"""Small microbatches as CUDA graphs, which the host launches at once.

A compiled layer's kernels take the host some milliseconds to launch, however few tokens there are; below some
thousands of tokens, or tens of thousands of a small model, the device waits for them. So a microbatch is padded to
one of few shapes, its inputs are copied to where the graph of that shape reads them, and the graph is replayed.
Everything else that differs between microbatches, such as ranks and rows of the adapters, the packed kernels read
from tables that keep their place.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from plora.data.types import Microbatch
from plora.kernels.dispatch import backend
from plora.kernels.schedule import NO_COUNTS, Counts
from plora.models.base import BaseModel
from plora.models.spec import ModelSpec
from plora.modules.packed import PackedAdapters
from plora.training.inputs import LONG, Inputs, Shape
from plora.training.loss import backward_cross_entropy, chunk_rows

log = logging.getLogger(__name__)

# Floating-point operations of a layer, forward and backward, that take an H100 as long as launching its kernels takes
# the host: 5 ms. A small model's layers reach fewer a second, hence the limit. On a slower GPU graphs are used for
# longer than they help.
_LAUNCH_BOUND = 2e12
_MOST_TOKENS = 16384
_MOST_GRAPHS = 32
# To run a shape for the first time and to capture it, the host launches everything twice. So a microbatch rather is
# padded to a shape that is there, until that has cost as much.
_GRAPH_LAUNCHES = 2
# The most that one is padded, beyond its own shape: a part of its tokens, of its labels and sequences, and some.
_MORE, _MORE_ROWS = 0.4, 256


def launch_bound_tokens(spec: ModelSpec) -> int:
    """Tokens of a microbatch up to which launching the kernels takes longer than running them."""
    per_token = 4 * sum(layer.in_features * layer.out_features for layer in spec.linears)
    return min(_MOST_TOKENS, int(_LAUNCH_BOUND / per_token))


def graph_tokens(spec: ModelSpec, device: torch.device, dtype: str) -> int:
    """Most tokens of a microbatch that a job would run as a CUDA graph; 0 where the CUDA kernels do not run.

    A GPU that is not here, where a plan is made for one, is taken to have them.
    """
    has_kernels = device.type == "cuda" and (not torch.cuda.is_available() or backend().name == "cuda")
    return launch_bound_tokens(spec) if has_kernels and dtype == "bf16" else 0


def small_microbatches(
    base: BaseModel,
    packed: PackedAdapters,
    most_tokens: int | None = None,
    *,
    token_budget: int | None = None,
    compile_loss: bool = False,
    graph_cost: int | None = None,
) -> MicrobatchGraphs | None:
    """What runs the small ones among a job's microbatches; None where the CUDA kernels do not run.

    ``most_tokens``: as ``JobSettings.graph_tokens``. ``token_budget``: of a microbatch, which none is padded beyond.
    The others as of `MicrobatchGraphs`.
    """
    if most_tokens is None:
        most_tokens = launch_bound_tokens(base.spec)
    if token_budget is not None:
        most_tokens = min(most_tokens, token_budget)
    if not most_tokens or packed.work_counts is None:
        return None
    return MicrobatchGraphs(base, packed, most_tokens, compile_loss=compile_loss, graph_cost=graph_cost)


def capture(step: Callable[[], None], device: torch.device, pool: Any = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what ``step`` launches; nothing of it runs on the device yet.

    Args:
        step: may write to tensors that keep their place.
        device: where it launches.
        pool: of memory, shared with other graphs; None for one of its own.

    Raises:
        RuntimeError: if the step does what cannot be captured, such as waiting for the device.
        torch.OutOfMemoryError: if there is no memory for what it allocates.
    """
    graph = torch.cuda.CUDAGraph()
    # The outer context, because a capture that fails would leave its own stream behind as the current one.
    with (
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        step()
    return graph


def differentiate(
    base: BaseModel, packed: PackedAdapters, inputs: Inputs, *, compile_loss: bool = False
) -> torch.Tensor:
    """Add the gradients of a routed microbatch to the arena and return its share of each slot's loss, fp32 ``[K]``.

    Args:
        base: the base model.
        packed: the adapters on it, within their ``route``.
        inputs: on the device; labels of slot ``K`` count for none.
        compile_loss: see `backward_cross_entropy`.
    """
    hidden = base.hidden_states(inputs.tokens, inputs.positions, inputs.sequences)
    losses = backward_cross_entropy(
        base.logits,
        hidden,
        inputs.rows,
        inputs.labels,
        inputs.weight,
        inputs.slots,
        packed.capacity + 1,
        chunk=chunk_rows(base.spec.vocab_size, base.device),
        compiled=compile_loss,
    )
    return losses[: packed.capacity]


@dataclass(eq=False)
class _Entry:
    """What is known of a shape: where its inputs lie, which launches it ran with last, and its graph."""

    inputs: Inputs
    key: Hashable = None
    counts: Counts = NO_COUNTS
    graph: torch.cuda.CUDAGraph | None = None
    losses: torch.Tensor | None = None


class MicrobatchGraphs:
    """Runs small microbatches padded to few shapes, from the second of a shape on as CUDA graphs.

    The graphs share a pool of memory as large as the activations of the largest. Where one cannot be captured, all
    further microbatches run as they come.

    Args:
        base: the base model.
        packed: the adapters on it. Graphs need the CUDA kernels; without them shapes are padded and nothing captured.
        most_tokens: of the microbatches taken.
        compile_loss: see `backward_cross_entropy`.
        graph_cost: tokens that take as long as making a graph: when larger shapes have served for one of fewer tokens
            at that price, it gets a graph of its own. 0 for one for each shape. Default: what suits the model.
    """

    def __init__(
        self,
        base: BaseModel,
        packed: PackedAdapters,
        most_tokens: int,
        *,
        compile_loss: bool = False,
        graph_cost: int | None = None,
    ) -> None:
        self.base, self.packed, self.most_tokens, self.compile_loss = base, packed, most_tokens, compile_loss
        self._graph_cost = _GRAPH_LAUNCHES * launch_bound_tokens(base.spec) if graph_cost is None else graph_cost
        self._wasted: Counter[int] = Counter()  # tokens, by how many would have been enough
        self.padding = 0  # tokens computed that belong to no sequence
        self.set_up = 0  # microbatches that were not just replayed
        self._entries: OrderedDict[Shape, _Entry] = OrderedDict()
        self._captures = packed.work_counts is not None
        self._pool: Any = None

    @property
    def captured(self) -> int:
        """Graphs at hand."""
        return sum(entry.graph is not None for entry in self._entries.values())

    def release(self) -> bool:
        """Give the memory of all graphs back and make no more; returns whether there were any."""
        if not self.captured:
            return False
        log.info("CUDA graphs give their memory up: from here on small microbatches run without")
        self._entries.clear()
        self.most_tokens = 0
        return True

    def takes(self, microbatch: Microbatch) -> bool:
        """Whether a microbatch is small enough."""
        return len(microbatch.tokens) <= self.most_tokens

    def forward_backward(
        self,
        microbatch: Microbatch,
        n_labels: Mapping[int, int],
        steps: Mapping[int, int],
        *,
        replace: Collection[int] = (),
    ) -> torch.Tensor:
        """As `plora.training.rounds.forward_backward`; the next call overwrites what this one returns."""
        inputs = Inputs.of(microbatch, n_labels)
        self.base.check_length(inputs.longest)  # a replay would not
        shape = self._shape(inputs)
        padding = shape.tokens - len(inputs.tokens)
        self.padding += padding
        padded = inputs.padded(shape, spare_slot=self.packed.capacity)
        entry = self._entry(shape, padded)
        with self.packed.route(
            microbatch.slot_tokens,
            base_tokens=padding,
            token_index=entry.inputs.token_index,
            steps=steps,
            dropout=True,
            work_counts=entry.counts,
            replace=replace,
        ):
            return self._run(entry)

    def _shape(self, inputs: Inputs) -> Shape:
        """What a microbatch is padded to."""
        own = inputs.padded_shape()
        # In no more memory than was planned.
        tokens = min(own.tokens, self.most_tokens)
        own = own._replace(tokens=tokens, labels=min(own.labels, tokens))
        if own in self._entries or not self._graph_cost:
            return own
        roomy = inputs.roomy_shape()
        serving = min((shape for shape in self._entries if _serves(shape, own) and inputs.fits(shape)), default=None)
        if serving is None:
            return roomy if roomy.tokens <= self.most_tokens else own
        self._wasted[own.tokens] += serving.tokens - own.tokens
        tight = roomy._replace(tokens=own.tokens, labels=min(roomy.labels, own.tokens))
        if self._wasted[own.tokens] <= self._graph_cost or not inputs.fits(tight):
            return serving
        del self._wasted[own.tokens]
        return tight

    def _entry(self, shape: Shape, padded: Inputs) -> _Entry:
        """That of a shape, with these inputs."""
        if shape in self._entries:
            self._entries.move_to_end(shape)
            self._entries[shape].inputs.copy_(padded)
        else:
            self._entries[shape] = _Entry(padded.to(self.base.device))
            if len(self._entries) > _MOST_GRAPHS:
                self._entries.popitem(last=False)
        return self._entries[shape]

    def _run(self, entry: _Entry) -> torch.Tensor:
        key, counts = self.packed.launch_key, self.packed.work_counts
        known = self._captures and entry.key == key
        if known and (entry.graph is None or entry.counts != counts):
            self.set_up += 1
            self._capture(entry)
        elif not known:
            entry.graph = entry.losses = None
        entry.key, entry.counts = key, counts or NO_COUNTS
        if entry.graph is None or entry.losses is None:
            # Also what has not run yet: a capture must meet nothing that is compiled or loaded on first use.
            self.set_up += not known
            return self._differentiate(entry)
        entry.graph.replay()
        return entry.losses

    def _differentiate(self, entry: _Entry) -> torch.Tensor:
        return differentiate(self.base, self.packed, entry.inputs, compile_loss=self.compile_loss)

    def _capture(self, entry: _Entry) -> None:
        """Capture an entry's graph under the present route, which runs nothing."""
        entry.graph = entry.losses = None
        if not self.captured:
            # torch forgets a pool with its last graph.
            self._pool = torch.cuda.graph_pool_handle()

        def run() -> None:
            entry.losses = self._differentiate(entry)

        try:
            entry.graph = capture(run, self.base.device, self._pool)
        except torch.OutOfMemoryError:
            self.most_tokens = len(entry.inputs.tokens) - 1
            self._entries.clear()  # what was allocated goes with the pool
            log.info("no memory for CUDA graphs of more than %d tokens", self.most_tokens)
        except RuntimeError as error:
            self.most_tokens = 0
            self._entries.clear()
            log.warning("small microbatches run without CUDA graphs: %s", str(error).splitlines()[0])


def _serves(shape: Shape, own: Shape) -> bool:
    """Whether to pad to ``shape`` what ``own`` would be enough for is not too wasteful."""
    counts = zip(shape[:3], own[:3], strict=True)
    lengths = shape.max_len <= max(2 * own.max_len, LONG)
    return lengths and all(count <= (1 + _MORE) * least + _MORE_ROWS for count, least in counts)
