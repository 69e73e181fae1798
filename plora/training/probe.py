"""Real training steps on made-up tokens, timed and weighed: what a cost model is calibrated with."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from plora.checkpoint.state import save_state
from plora.data.types import IGNORE_INDEX, Example
from plora.models.base import BaseModel
from plora.modules.config import AdapterConfig
from plora.modules.packed import pack_adapters
from plora.training.budget import TokenBudget
from plora.training.evaluation import validation_losses
from plora.training.generation import Prompt, generate
from plora.training.graphs import MicrobatchGraphs, small_microbatches
from plora.training.loss import can_compile, forget_compiled
from plora.training.optimizer import AdamWConfig, PackedAdamW
from plora.training.peaks import PeakMemory
from plora.training.rounds import Readback, batch_gradients, work_of

# A round's first runs compile what is new about its shape; they are over once one is this close to the best so far.
_SETTLED = 1.3
_MOST_WARMUPS = 4


@dataclass(frozen=True)
class MeasuredRound:
    """A round as it was measured.

    Args:
        tokens: of all adapters.
        token_rank: tokens times computed rank, summed over the adapters.
        labels: labelled tokens.
        squares: squared lengths of the sequences, summed.
        sequences: how many of them.
        adapters: that took part.
        params: parameters of those.
        microbatches: forward and backward passes.
        seconds: median of the steady runs; on a CPU the shortest.
        warmup_seconds: what the runs before took longer than steady ones: compilation, mostly.
        largest: tokens of the largest microbatch.
        allocated: peak bytes of live tensors; None where that cannot be told.
        reserved: peak bytes of the allocator; None on a CPU.
    """

    tokens: int
    token_rank: int
    labels: int
    squares: int
    sequences: int
    adapters: int
    params: int
    microbatches: int
    seconds: float
    warmup_seconds: float
    largest: int
    allocated: int | None
    reserved: int | None


class PackProbe:
    """A pack of adapters to run rounds with. Use as a context manager: the base is unpacked at the end.

    Args:
        base: the base model, not packed; its layers are compiled where a sweep would.
        ranks: of the adapters, each on all linear layers.
        peaks: counts memory; made before the base was loaded, so that the base counts.
        optimizer_state: see `PackedAdamW`.
        graph_tokens: see `JobSettings`.
    """

    def __init__(
        self,
        base: BaseModel,
        ranks: Sequence[int],
        peaks: PeakMemory,
        optimizer_state: str = "exact",
        graph_tokens: int | None = None,
    ) -> None:
        began = time.perf_counter()
        self.base, self._peaks = base, peaks
        self.packed = pack_adapters(base.module, [AdapterConfig(rank=rank) for rank in ranks])
        self._optimizer = PackedAdamW(self.packed, optimizer_state)
        for slot in self.packed.slots:
            self._optimizer.add(slot, AdamWConfig(max_grad_norm=1.0))
        self._compiled = can_compile(base.device)
        if self._compiled:
            base.compile_layers()
        # Each round is measured at its own shape, as most of a long job's are replayed.
        self._graphs = small_microbatches(base, self.packed, graph_tokens, compile_loss=self._compiled, graph_cost=0)
        self._random = np.random.default_rng(0)
        self.pack_seconds = time.perf_counter() - began

    @property
    def graph_tokens(self) -> int:
        """Most tokens of a microbatch that runs as a CUDA graph; 0 where none does."""
        return 0 if self._graphs is None else self._graphs.most_tokens

    def __enter__(self) -> PackProbe:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.packed.unpack(self.base.module)
        forget_compiled(self.base.device)

    def replace(self, ranks: Sequence[int]) -> None:
        """Exchange the adapters for others, as a job does whose trials end and join."""
        for slot in self.packed.slots:
            self._optimizer.remove(slot)
            self.packed.remove(slot)
        for rank in ranks:
            slot = self.packed.add(AdapterConfig(rank=rank))
            self._optimizer.add(slot, AdamWConfig(max_grad_norm=1.0))

    def round(
        self, lengths: Sequence[Sequence[int]], token_budget: int, *, labelled: float = 1.0, repeats: int = 3
    ) -> MeasuredRound:
        """Train one round several times and say what it took.

        Args:
            lengths: by adapter, the tokens of each of its sequences; none for one that sits out.
            token_budget: most tokens of a microbatch.
            labelled: part of each sequence that is labelled.
            repeats: steady runs; warm-up runs come before them where layers are compiled.

        Raises:
            torch.OutOfMemoryError: if the round does not fit.
        """
        batches = {
            slot: [self._example(length, labelled) for length in own]
            for slot, own in zip(self.packed.slots, lengths, strict=True)
            if own
        }
        self.packed.release_workspace()
        self._peaks.reset()
        # Before any graph: a replayed one allocates nothing.
        warmups = [self._queue(batches, token_budget, None)[0].wait()[1]] if self._compiled else []
        allocated, reserved = self._peaks.allocated, self._peaks.reserved
        warmups += self._warm_up(batches, token_budget)
        runs, count = self._steady_runs(batches, token_budget, repeats)
        # What else runs on a CPU only ever adds.
        steady = statistics.median(runs) if self._compiled else min(runs)
        work = work_of(self.packed, batches)
        longest = max(len(example) for batch in batches.values() for example in batch)
        return MeasuredRound(
            **work,
            microbatches=count,
            seconds=steady,
            warmup_seconds=sum(max(0.0, seconds - steady) for seconds in warmups),
            largest=max(longest, -(-work["tokens"] // count)),
            allocated=allocated if self._compiled else self._peaks.allocated,
            reserved=reserved if self._compiled else self._peaks.reserved,
        )

    def keep_busy(self, lengths: Sequence[Sequence[int]], token_budget: int, seconds: float) -> None:
        """Train a round again and again for about so many seconds."""
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            self.round(lengths, token_budget, repeats=5)

    def evaluation(self, tokens: int, length: int, labelled: float = 1.0) -> tuple[float, float]:
        """Seconds of a validation loss over so many tokens, by one adapter, and what the first one took more."""
        examples = [self._example(length, labelled) for _ in range(max(1, tokens // length))]
        slot, budget = self.packed.slots[0], TokenBudget(tokens, "calibration")
        runs = [
            self._seconds(lambda: validation_losses(self.base, self.packed, {slot: examples}, budget))
            for _ in range(3 if self._compiled else 1)
        ]
        return min(runs), runs[0] - min(runs)

    def generation(self, rows: int, prompt: int, new_tokens: int) -> float:
        """Seconds of generating so many tokens for each of so many rows, prompts included."""
        slots = self.packed.slots
        prompts = [Prompt(slots[i % len(slots)], self._example(prompt, 1.0).inputs) for i in range(rows)]
        budget = TokenBudget(rows * (prompt + new_tokens), "calibration")
        return self._seconds(
            lambda: generate(self.base, self.packed, prompts, max_new_tokens=new_tokens, stop=(), cache_budget=budget)
        )

    def save(self, slot: int, folder: Path | None = None) -> float:
        """Seconds of writing an adapter's weights, to a temporary file in ``folder``."""
        factors = self.packed.adapters[slot].factors()
        tensors = {f"{path}.{name}": x for path, pair in factors.items() for name, x in zip("AB", pair, strict=True)}
        with tempfile.TemporaryDirectory(dir=folder) as place:
            return self._seconds(lambda: save_state(Path(place, "adapter.safetensors"), tensors, {}))

    def _warm_up(self, batches: Mapping[int, Sequence[Example]], token_budget: int) -> list[float]:
        """Run until runs no longer get shorter: never on a CPU, where nothing is compiled."""
        runs: list[float] = []
        # The second run of a new shape captures its graph.
        fewest = 2 if self._graphs is None else 3
        while self._compiled and len(runs) < _MOST_WARMUPS:
            runs.append(self._queue(batches, token_budget, self._graphs)[0].wait()[1])
            if len(runs) >= fewest and runs[-1] > min(runs[:-1]) / _SETTLED:
                break
        return runs

    def _steady_runs(
        self, batches: Mapping[int, Sequence[Example]], token_budget: int, repeats: int
    ) -> tuple[list[float], int]:
        """Seconds of each run, the next queued before the last is read as in a job, and the microbatches of one."""
        waiting, count = self._queue(batches, token_budget, self._graphs)
        runs: list[Readback] = []  # the first run is left out: it found the device idle, or memory not yet mapped
        while len(runs) < repeats:
            following, count = self._queue(batches, token_budget, self._graphs)
            waiting.wait()
            runs.append(following)
            waiting = following
        return [run.wait()[1] for run in runs], count

    def _queue(
        self, batches: Mapping[int, Sequence[Example]], token_budget: int, graphs: MicrobatchGraphs | None
    ) -> tuple[Readback, int]:
        """Queue one round and its step; its numbers to come, and its microbatches."""
        steps = dict.fromkeys(batches, 0)
        readback = Readback(self.base.device)
        losses, count = batch_gradients(
            self.base,
            self.packed,
            batches,
            steps,
            token_budget,
            compile_loss=self._compiled,
            graphs=graphs,
        )
        outcome = self._optimizer.step(dict.fromkeys(batches, (1e-4, 1e-4)), losses)
        readback.send(torch.stack((losses, outcome.grad_norm, outcome.skipped)))
        return readback, count

    def _seconds(self, run: object) -> float:
        assert callable(run)
        began = time.perf_counter()
        run()
        if self._compiled:
            torch.cuda.synchronize(self.base.device)
        return time.perf_counter() - began

    def _example(self, length: int, labelled: float) -> Example:
        tokens = self._random.integers(0, self.base.spec.vocab_size, length + 1, dtype=np.int32)
        labels = tokens[1:].copy()
        first = min(length - 1, round(length * (1 - labelled)))
        labels[:first] = IGNORE_INDEX
        return Example(tokens[:-1], labels, tokens[: max(1, first)], "")
