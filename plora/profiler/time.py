"""What a round of a pack takes in seconds: a linear model with a launch floor, one per tensor-parallel degree.

For a round of ``N`` tokens in ``m`` microbatches, shared by ``K`` adapters with ``n_i`` tokens that are computed at
rank ``r_i`` (:func:`~plora.modules.config.computed_rank`):

    T = max(m * floor, m * (a + w * min(1, P / P_tile)) + b * max(N, m * step) + c * sum_i n_i r_i + h * L + q * S
            + g * Q + e * K) + o * P + o0

Matrix products of fewer tokens than ``step`` take no less than those of so many: they wait for the weights. ``L`` are
the labelled tokens, the only ones that the output head and the loss are computed for; ``S`` is the sum of the squared
lengths of the ``Q`` sequences, for attention, which works on tiles of rows of one sequence; ``P`` are the adapters'
parameters on the device, which the optimizer step passes over. A microbatch takes the longer, however few its tokens,
the wider its adapters are, until they have ``P_tile`` together, which fill the widest tiles of the kernels: from there
on more of them work side by side. The coefficients come from measured rounds (:func:`fit_time`) or, marked estimated,
from a data sheet (:func:`estimate`).

A process loads the base and compiles its layers once (``load``, ``compile``); each job of it makes its pack and warms
up (``start``), and each trial is evaluated and saved.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from plora.profiler.hardware import GPU, GPUS
from plora.profiler.memory import DTYPE_BYTES, NF4_BYTES, MemoryModel

# Part of the data sheet's product rate that a whole training step of packed adapters keeps, compiled layers.
# Measured on an H100 for a 7B shape: 18.8k tokens/s with the base alone are 0.54 of 989 TFLOP/s; adapters' extra passes
# over the activations take about a tenth more.
EFFICIENCY = 0.48
# Products of thin adapters reach a smaller part.
RANK_EFFICIENCY = 0.25
# Part of the data sheet's memory bandwidth that streaming passes keep.
STREAM_EFFICIENCY = 0.8
# Bytes that an optimizer step reads and writes per parameter, by its moments.
OPTIMIZER_BYTES = {"exact": 34, "8bit": 22}
# Seconds of launches and Python per compiled, packed layer, forward and backward, that small microbatches cannot go
# below: on an H100's host 107 to 180 ms over 28 layers, 105 to 168 ms over 24.
LAUNCH_PER_LAYER = 5e-3
# The same per microbatch, whatever the layers, where microbatches run as CUDA graphs.
GRAPH_LAUNCH = 5e-3
# The same for one eager adapter through peft (measured on an H100: 171 ms over 28 layers), and its share of the rate.
PEFT_LAUNCH_PER_LAYER = 6.1e-3
PEFT_EFFICIENCY = 0.36
# Loading a base from a local disk, bytes/s, and compiling the layers, seconds.
LOAD_BANDWIDTH = 1.5e9
COMPILE_SECONDS = 45.0
# Making a pack and the first rounds of a job in a process whose layers are compiled.
START_SECONDS = 3.0
# Writing adapters to a local disk, bytes/s.
SAVE_BANDWIDTH = 1.0e9
# Rows of a GPU's matrix products, and of attention within a sequence, at a time.
TOKEN_STEP = 128
# Ranks of the kernels' widest tiles, and seconds that full ones take longer, per layer: on an H100 1.8 ms over 24
# layers, 2.4 over 28.
TILE_RANKS, TILE_PER_LAYER = 128, 8e-5
# Part of the rate that variable-length attention over short sequences keeps.
ATTENTION_EFFICIENCY = 0.25
# Generation: launches and Python per layer and token, eager, and with decode steps as CUDA graphs (on an H100 4.6 ms a
# step of 64 rows over 22 layers, 0.8 of which the weights take).
DECODE_PER_LAYER, GRAPH_DECODE_PER_LAYER = 1e-3, 2e-4


@dataclass(frozen=True)
class StepCost:
    """Coefficients of a round at one degree, seconds per unit. See the module's formula.

    Args:
        floor: per microbatch, whatever it holds.
        per_microbatch: ``a``.
        per_token: ``b``.
        per_token_rank: ``c``.
        per_adapter: ``e``.
        per_param: ``o``, per adapter parameter on the device.
        per_step: ``o0``.
        per_label: ``h``.
        per_square: ``q``.
        per_sequence: ``g``.
        per_tile: ``w``, per microbatch.
        tile_params: ``P_tile``.
        token_step: what matrix products round a microbatch's tokens up to. A plan knows tokens on average, for which
            ``per_microbatch`` has half a step in it. A microbatch costs what one of a step's tokens does, or more.
        per_eval_token: forward pass alone, without the head.
        per_generated_token: one token of one row in packed generation, beside ``per_decode_step``.
        per_decode_step: one more token for all rows of a batch, however many they are.
        save: writing one adapter, however small.
        per_saved_param: writing one more parameter.
        start: making a job's pack and its first, slower rounds.
        per_graph: making a CUDA graph for microbatches of another size: launching it without and capturing it.
        eval_start: making a pack ready to be evaluated, beside the evaluation; ``start`` has it already.
        load: loading the base, once per process.
        compile: compiling its layers, once per process, in the first job; where it was measured, with the files that
            the compiler keeps on disk.
        estimated: from a data sheet rather than measured.
    """

    floor: float
    per_microbatch: float
    per_token: float
    per_token_rank: float
    per_adapter: float
    per_param: float
    per_step: float = 0.0
    per_label: float = 0.0
    per_square: float = 0.0
    per_sequence: float = 0.0
    per_tile: float = 0.0
    tile_params: float = 1.0
    token_step: int = 1
    per_eval_token: float = 0.0
    per_generated_token: float = 0.0
    per_decode_step: float = 0.0
    save: float = 0.0
    per_saved_param: float = 0.0
    start: float = 0.0
    per_graph: float = 0.0
    eval_start: float = 0.0
    load: float = 0.0
    compile: float = 0.0
    estimated: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "estimated" and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"time model: {name} must be a number of seconds that is not negative, got {value!r}")

    def even_tokens(self, tokens: float, microbatches: int) -> float:
        """Tokens of a round as matrix products have them, less half a step for each microbatch."""
        if self.token_step <= 1:
            return tokens
        return microbatches * self.token_step * (math.ceil(tokens / microbatches / self.token_step) - 0.5)

    def product_tokens(self, tokens: float, microbatches: int) -> float:
        """Tokens whose time matrix products take: no fewer than a step's in each microbatch."""
        return max(tokens, microbatches * self.token_step)

    def tiles(self, params: float) -> float:
        """The part of the kernels' widest tiles that adapters of so many parameters fill together, at most 1."""
        return min(1.0, params / self.tile_params)

    @property
    def full_microbatch(self) -> float:
        """Seconds of a microbatch whatever its tokens, where adapters fill the tiles, as most packs do."""
        return self.per_microbatch + self.per_tile

    def extra_seconds(self, token_rank: float, labels: float, squares: float, sequences: float) -> float:
        """Seconds of what tokens cost beside their number: their adapters' ranks, the head, attention."""
        attention = squares * self.per_square + sequences * self.per_sequence
        return token_rank * self.per_token_rank + labels * self.per_label + attention

    def round_of(self, tokens: float, extra: float, adapters: int, params: float, microbatches: int) -> float:
        """Seconds of one round of so many tokens on average, from their ``extra`` seconds; otherwise as
        :meth:`round_seconds`.
        """
        products = self.product_tokens(tokens, microbatches) * self.per_token
        launches = microbatches * (self.per_microbatch + self.tiles(params) * self.per_tile)
        work = launches + products + extra + adapters * self.per_adapter
        return max(microbatches * self.floor, work) + params * self.per_param + self.per_step

    def round_seconds(
        self,
        tokens: float,
        token_rank: float,
        adapters: int,
        params: float,
        microbatches: int,
        labels: float | None = None,
        squares: float = 0.0,
        sequences: float = 0.0,
    ) -> float:
        """Seconds of one round of just so many tokens.

        Args:
            tokens: tokens of all adapters, ``N``.
            token_rank: ``sum_i n_i r_i``.
            adapters: adapters that contribute, ``K``.
            params: their parameters on the device, ``P``.
            microbatches: ``m``.
            labels: labelled tokens, ``L``; all of them if None.
            squares: squared lengths of the sequences, summed, ``S``.
            sequences: how many of them, ``Q``.
        """
        extra = self.extra_seconds(token_rank, tokens if labels is None else labels, squares, sequences)
        return self.round_of(self.even_tokens(tokens, microbatches), extra, adapters, params, microbatches)

    def eval_seconds(self, tokens: float, labels: float) -> float:
        """Seconds of evaluating so many tokens, so many of them labelled: no backward pass."""
        return tokens * self.per_eval_token + labels * self.per_label / 2

    def save_seconds(self, params: float) -> float:
        """Seconds of writing an adapter of so many parameters."""
        return self.save + params * self.per_saved_param

    def generation_seconds(self, rows: float, tokens_per_row: float, rows_at_a_time: float) -> float:
        """Seconds of generating ``tokens_per_row`` for so many rows in batches."""
        batches = math.ceil(rows / max(1.0, rows_at_a_time))
        return tokens_per_row * (batches * self.per_decode_step + rows * self.per_generated_token)


@dataclass(frozen=True)
class TimeModel:
    """Round costs by tensor-parallel degree, for one device kind, model and dtype.

    Args:
        device: name of the GPU, or ``cpu``.
        costs: degree -> coefficients.
        source: where they come from, for the preview: ``data sheet``, ``measured 2026-11-21``.
    """

    device: str
    costs: Mapping[int, StepCost]
    source: str = "data sheet"

    def __post_init__(self) -> None:
        if not self.costs:
            raise ValueError("time model: no coefficients for any degree")

    def cost(self, degree: int) -> StepCost:
        """Coefficients at a degree.

        Raises:
            ValueError: if the model has none for it.
        """
        if degree not in self.costs:
            known = ", ".join(map(str, sorted(self.costs)))
            raise ValueError(f"no time model for tensor-parallel degree {degree}: there is one for {known}")
        return self.costs[degree]

    @property
    def estimated(self) -> bool:
        """Whether any coefficient comes from a data sheet."""
        return any(cost.estimated for cost in self.costs.values())

    def measured(self, degree: int, cost: StepCost) -> TimeModel:
        """The model with measured coefficients at ``degree``; the other degrees keep theirs."""
        return replace(self, costs={**self.costs, degree: replace(cost, estimated=False)}, source="measured")


def estimate(gpu: GPU, memory: MemoryModel, degrees: Sequence[int] = (1,)) -> TimeModel:
    """The time model of a GPU that is not here, from its data sheet."""
    costs = {degree: _estimate_cost(gpu, memory, degree) for degree in degrees}
    return TimeModel(device=gpu.name, costs=costs)


def estimate_cpu(memory: MemoryModel, threads: int) -> TimeModel:
    """The time model of a CPU, measured with a 135M model: 0.075 TFLOP/s a thread in fp32, 0.13 in bf16.

    A microbatch costs about 3 ns per base parameter whatever it holds, because oneDNN lays the weights out anew, and an
    adapter about 1.3 ms a layer, in calls of its own.
    """
    rate = max(1, threads) * (0.075 if memory.dtype == "fp32" else 0.13)
    cpu = GPU("cpu", rate / EFFICIENCY, 2e10, 0, 1e9)
    cost = replace(
        _estimate_cost(cpu, memory, 1),
        start=0.5,
        load=2.0 + memory.base_bytes() / 1e9,
        compile=0.0,
        floor=2e-3 * memory.spec.num_layers,
        per_microbatch=3e-9 * memory.spec.n_params,
        per_adapter=1.3e-3 * memory.spec.num_layers,
        per_step=2e-3,
        per_tile=0.0,
        per_sequence=0.0,
        token_step=1,
    )
    return TimeModel(device="cpu", costs={1: cost})


def default_time(memory: MemoryModel) -> TimeModel:
    """A time model where nobody says what the device is: this CPU, or the data sheet of a common GPU."""
    if memory.device == "cpu":
        return estimate_cpu(memory, os.cpu_count() or 1)
    return estimate(GPUS["a100_80gb"], memory)


def one_at_a_time(model: TimeModel, memory: MemoryModel, gpu: GPU | None) -> TimeModel:
    """What training the same trials one by one through eager peft costs: the same device, its floor and its rate.

    Without a data sheet only the rate differs, by the measured ratio of the two.
    """
    costs = {}
    for degree, cost in model.costs.items():
        slower = EFFICIENCY / PEFT_EFFICIENCY
        floor = PEFT_LAUNCH_PER_LAYER * memory.spec.num_layers if gpu is not None else cost.floor * slower
        costs[degree] = replace(
            cost,
            floor=max(cost.floor, floor),
            per_token=cost.per_token * slower,
            per_label=cost.per_label * slower,
            per_tile=0.0,
            # Each is a process of its own, which loads the base; nothing is compiled.
            start=memory.base_bytes(degree) / LOAD_BANDWIDTH,
            load=0.0,
            compile=0.0,
            estimated=True,
        )
    return TimeModel(device=model.device, costs=costs, source="data sheet, eager peft")


def _estimate_cost(gpu: GPU, memory: MemoryModel, degree: int) -> StepCost:
    spec, e = memory.spec, DTYPE_BYTES[memory.dtype]
    linear = spec.num_layers * sum(layer.in_features * layer.out_features for layer in spec.linears)
    head = spec.vocab_size * spec.dim
    # FLOPs per weight and token: forward, gradient of the input, and the forward of layers that are recomputed.
    passes = 4 + 2 * memory.recomputed_layers / spec.num_layers
    rate = gpu.tflops * 1e12 * EFFICIENCY * (0.75 if memory.quantize else 1.0)
    reduces = passes * spec.num_layers if degree > 1 else 0
    bytes_sent = reduces * spec.dim * e * 2 * (degree - 1) / degree
    weights = linear * (NF4_BYTES if memory.quantize else e) + head * e
    streamed = passes / 2 * weights / degree / (gpu.bandwidth * STREAM_EFFICIENCY)
    latency = reduces * gpu.link_latency
    params_per_rank = spec.num_layers * sum(layer.in_features + layer.out_features for layer in spec.linears)
    launching = LAUNCH_PER_LAYER * spec.num_layers
    launches = GRAPH_LAUNCH if memory.graph_tokens else launching
    decoding = GRAPH_DECODE_PER_LAYER if memory.graph_tokens else DECODE_PER_LAYER
    per_token = passes * linear / degree / rate + bytes_sent / gpu.link
    # Scores and weighted values, half of them masked; the backward pass computes the scores anew.
    attention = (passes / 4) * 7 * spec.num_layers * spec.num_heads * spec.head_dim
    per_square = attention / degree / (gpu.tflops * 1e12 * ATTENTION_EFFICIENCY)
    return StepCost(
        floor=max(streamed, launches) + latency,
        per_microbatch=latency + 5e-5 * spec.num_layers,
        per_token=per_token,
        token_step=TOKEN_STEP,
        per_token_rank=6 * params_per_rank / degree / (gpu.tflops * 1e12 * RANK_EFFICIENCY),
        per_adapter=2e-6 * spec.num_layers,
        per_param=OPTIMIZER_BYTES[memory.moments] / (gpu.bandwidth * STREAM_EFFICIENCY),
        per_step=1e-3,
        per_label=4 * head / degree / rate,
        per_tile=TILE_PER_LAYER * spec.num_layers,
        tile_params=memory.adapter_params(TILE_RANKS, degree=degree),
        per_square=per_square,
        per_sequence=per_square * TOKEN_STEP**2,
        per_eval_token=per_token / passes * 2,
        per_generated_token=2 * (linear + head) / degree / rate,
        per_decode_step=streamed / passes * 2 + decoding * spec.num_layers,
        save=0.2,
        per_saved_param=4 / SAVE_BANDWIDTH,
        start=START_SECONDS,
        per_graph=2 * launching if memory.graph_tokens else 0.0,
        load=memory.base_bytes(degree) / LOAD_BANDWIDTH,
        compile=COMPILE_SECONDS,
    )
