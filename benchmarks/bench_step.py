"""A whole training step at full size: plora beside the frozen base, plain bmm adapters, peft and torchtune.

    python benchmarks/bench_step.py [--model Qwen/Qwen2.5-7B-Instruct] [--json FILE]
    python benchmarks/bench_step.py --case 16x512:8x16 --case 8x2048:8x16    # sequences x length : adapters x rank
    python benchmarks/bench_step.py --memory --providers                     # what saving memory costs

Weights are random (right for timing, never for quality), every token is labelled, for the baselines
too. ``tokens_per_s_forward_backward`` leaves the optimizer out, ``tokens_per_s_step`` has it in.
The limit is the frozen base: no adapter can be trained with less. Where launching kernels takes longer than running
them, plora's small microbatches run as CUDA graphs, as in a sweep, and so does the base.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

import plora
from plora.data.microbatch import pack
from plora.data.types import Example
from plora.models import from_config
from plora.models.base import BaseModel
from plora.models.presets import preset_config
from plora.profiler import MemoryModel
from plora.training.graphs import launch_bound_tokens, small_microbatches
from plora.training.inputs import Inputs
from plora.training.loss import backward_cross_entropy, chunk_rows
from plora.training.optimizer import OPTIMIZER_STATES, AdamWConfig, PackedAdamW
from plora.training.rounds import batch_gradients
from providers import BmmAdapters, TorchtuneLoRA, peft_model
from records import Records

STANDARD_MIX = [8] * 16 + [16] * 8 + [32] * 4 + [64] * 2 + [128] * 2
# By default peft keeps adapters in fp32, as plora does, and computes with them in fp32 too.
PEFT_FORMS = [
    ("peft as shipped, one adapter", True, [(1, 128), (1, 1024)]),
    ("peft in bf16, one adapter", False, [(1, 128), (4, 128), (1, 1024)]),
]
STANDARD_CASE = "64x128:standard"


@dataclass(frozen=True)
class Options:
    """How it is trained; what is saved in memory costs time.

    Args:
        microbatch: most tokens of a microbatch.
        recompute: layers recomputed in backward; True is all.
        optimizer_state: exact or 8bit, plora's.
        quantize: the base's precision, None for bf16.
    """

    microbatch: int = 8192
    recompute: bool | int = False
    optimizer_state: str = "exact"
    quantize: str | None = None

    def __str__(self) -> str:
        parts = [f"microbatches of {self.microbatch}"]
        if self.recompute:
            parts.append("all layers recomputed" if self.recompute is True else f"{self.recompute} layers recomputed")
        return ", ".join(parts + ["8-bit moments"] * (self.optimizer_state == "8bit"))


MEMORY_OPTIONS = [
    Options(8192),
    Options(8192, optimizer_state="8bit"),
    Options(4096),
    Options(4096, optimizer_state="8bit"),
    Options(2048, optimizer_state="8bit"),
    Options(1024, optimizer_state="8bit"),
    Options(4096, recompute=True, optimizer_state="8bit"),
]


@dataclass(frozen=True)
class Case:
    """What is trained: ``sequences`` of ``length`` tokens in a step, shared evenly by ``ranks``' adapters."""

    model: str
    ranks: list[int]
    sequences: int
    length: int
    options: Options

    @classmethod
    def parse(cls, text: str, model: str, options: Options) -> Case:
        """``"64x128:standard"``, or ``"16x512:8x16"`` for 8 adapters of rank 16 on 16 sequences of 512 tokens.

        Raises:
            ValueError: if it is neither, or the adapters do not share the sequences evenly.
        """
        try:
            shape, _, adapters = text.partition(":")
            sequences, length = map(int, shape.split("x"))
            ranks = STANDARD_MIX if adapters == "standard" else _equal_ranks(*map(int, adapters.split("x")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"a case reads 64x128:standard or 16x512:8x16, got {text!r}") from error
        if sequences % len(ranks):
            raise ValueError(f"case {text}: {sequences} sequences must be a multiple of its {len(ranks)} adapters")
        return cls(model, ranks, sequences, length, options)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def name(self) -> str:
        mix = "standard mix" if self.ranks == STANDARD_MIX else f"{len(self.ranks)} x r{self.ranks[0]}"
        base = f", {self.options.quantize}" if self.options.quantize else ""
        return f"{self.model.rpartition('/')[2].lower()}{base}/{mix}/{self.sequences}x{self.length}"

    def batches(self, vocab: int) -> dict[int, list[Example]]:
        """One batch per slot; every token has a label."""
        generator, per_slot = np.random.default_rng(0), self.sequences // len(self.ranks)
        return {
            slot: [_example(generator, vocab, self.length) for _ in range(per_slot)] for slot in range(len(self.ranks))
        }


def _equal_ranks(count: int, rank: int) -> list[int]:
    return [rank] * count


def _example(generator: np.random.Generator, vocab: int, length: int) -> Example:
    tokens = generator.integers(0, vocab, length + 1, dtype=np.int32)
    return Example(tokens[:-1], tokens[1:], tokens[:1], "")


def seconds(run: Callable[[], object], repeats: int, warmup: int = 3) -> float:
    """Median time from one ``run`` to the next, each queued while the device still works on the one before."""
    ends = []
    for _ in range(warmup + repeats):
        run()
        ends.append(torch.cuda.Event(enable_timing=True))
        ends[-1].record()
        if len(ends) > 1:
            ends[-2].synchronize()
    ends[-1].synchronize()
    return statistics.median(one.elapsed_time(other) for one, other in pairwise(ends[warmup - 1 :])) / 1000


@contextmanager
def fresh_memory() -> Iterator[None]:
    """Peak memory counted from here, after giving back what the provider before has left."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield


def measure(
    records: Records,
    case: str,
    provider: str,
    tokens: int,
    forward_backward: Callable[[], object],
    step: Callable[[], object] | None,
    repeats: int,
    notes: str = "",
) -> None:
    """Time one provider and print its line; running out of memory is a result, not an end."""
    try:
        elapsed = seconds(forward_backward, repeats)
        records.add(case, provider, "tokens_per_s_forward_backward", tokens / elapsed, "tokens/s", notes)
        if step is not None:
            elapsed = seconds(step, repeats)
            records.add(case, provider, "tokens_per_s_step", tokens / elapsed, "tokens/s", notes)
        records.add(case, provider, "peak_gib", torch.cuda.max_memory_allocated() / 2**30, "GiB", notes)
    except torch.OutOfMemoryError as error:
        print(f"{provider}: out of memory ({error.args[0].splitlines()[0]})", flush=True)
        return
    figures = [row for row in records.rows if (row["case"], row["provider"]) == (case, provider)]
    print(
        f"{provider}: " + ", ".join(f"{row['metric']} {row['value']:.5g} {row['unit']}" for row in figures), flush=True
    )


def frozen_base(records: Records, case: Case, base: BaseModel, repeats: int) -> None:
    """The base alone, compiled: forward, loss, and backward to the embeddings."""
    batches = case.batches(base.spec.vocab_size)
    with fresh_memory():
        base.set_activation_checkpointing(case.options.recompute)
        base.compile_layers()
        run, note = _gradients_through(base, batches, case.options.microbatch), _notes(case)
        if min(case.tokens, case.options.microbatch) <= launch_bound_tokens(base.spec):
            run, note = _as_graph(run), f"{note}, as a CUDA graph"
        measure(records, case.name, "frozen base", case.tokens, run, None, repeats, note)


def packed(records: Records, case: Case, base: BaseModel, repeats: int) -> None:
    """The packed step: the functions that a sweep's rounds call."""
    batches = case.batches(base.spec.vocab_size)
    configs = [plora.AdapterConfig(rank=rank, alpha=2 * rank, seed=i) for i, rank in enumerate(case.ranks)]
    with fresh_memory():
        adapters = plora.pack_adapters(base.module, configs)
        optimizer = PackedAdamW(adapters, case.options.optimizer_state)
        for slot in adapters.slots:
            optimizer.add(slot, AdamWConfig(max_grad_norm=1.0))
        base.set_activation_checkpointing(case.options.recompute)
        base.compile_layers()
        # All steps have the same shapes, so that none is padded for others to share its graph.
        graphs = small_microbatches(base, adapters, compile_loss=True, graph_cost=0)
        rates = dict.fromkeys(adapters.slots, (1e-4, 1e-4))
        steps = dict.fromkeys(adapters.slots, 0)

        def forward_backward() -> torch.Tensor:
            return batch_gradients(
                base,
                adapters,
                batches,
                steps,
                case.options.microbatch,
                compile_loss=True,
                graphs=graphs,
            )[0]

        def step() -> None:
            optimizer.step(rates, forward_backward())

        provider = f"plora, {case.options}"
        measure(records, case.name, provider, case.tokens, forward_backward, step, repeats, _notes(case))
        for part, size in predicted_parts(base, case, configs).items():
            records.add(case.name, provider, f"predicted_{part}_gib", size / 2**30, "GiB", "of the memory model")
        adapters.unpack(base.module)


def predicted_parts(base: BaseModel, case: Case, configs: list[plora.AdapterConfig]) -> dict[str, int]:
    """Where the memory goes, in bytes, by the model that plans with it."""
    model = MemoryModel(
        base.spec,
        "bf16",
        activation_checkpointing=case.options.recompute,
        quantize=case.options.quantize,
        moments=case.options.optimizer_state,
        loss_chunk=chunk_rows(base.spec.vocab_size, base.device),
        compiled=True,
    )
    parts = model.parts(configs, min(case.options.microbatch, case.tokens))
    return {name: getattr(parts, name) for name in ("base", "adapters", "activations", "logits", "allocated")}


def bmm(records: Records, case: Case, base: BaseModel, repeats: int) -> None:
    """Adapters as batched products on equal segments, one product per rank: what plain torch offers."""
    batches = case.batches(base.spec.vocab_size)
    with fresh_memory():
        adapters = BmmAdapters(base.module, case.ranks)
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-4, fused=True)
        base.set_activation_checkpointing(case.options.recompute)
        base.compile_layers()
        gradients = _gradients_through(base, batches, case.tokens)

        def forward_backward() -> None:
            optimizer.zero_grad()
            gradients()

        def step() -> None:
            forward_backward()
            optimizer.step()

        note = _notes(case, microbatch=case.tokens) + ", adapters in bf16 without fp32 weights"
        measure(records, case.name, "bmm per rank", case.tokens, forward_backward, step, repeats, note)
        adapters.restore(base.module)


def peft_one_at_a_time(records: Records, case: Case, repeats: int) -> None:
    """One adapter of rank 16 by peft on the Hugging Face model, as people train today."""
    for name, fp32, shapes in PEFT_FORMS:
        model = peft_model(preset_config(case.model), 16, fp32=fp32)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        for batch, length in shapes:
            with fresh_memory():
                tokens = torch.randint(model.config.vocab_size, (batch, length), device="cuda")

                def forward_backward(
                    tokens: torch.Tensor = tokens,
                    model: torch.nn.Module = model,
                    optimizer: torch.optim.Optimizer = optimizer,
                ) -> None:
                    optimizer.zero_grad()
                    model(input_ids=tokens, labels=tokens).loss.backward()

                def step(
                    run: Callable[[], None] = forward_backward, optimizer: torch.optim.Optimizer = optimizer
                ) -> None:
                    run()
                    optimizer.step()

                provider, note = f"{name}, {batch}x{length}", "rank 16, eager, sdpa"
                measure(records, case.name, provider, batch * length, forward_backward, step, repeats, note)
        del model, optimizer, forward_backward, step
        gc.collect()
        torch.cuda.empty_cache()


def torchtune_one_at_a_time(records: Records, case: Case, repeats: int) -> None:
    """One adapter by torchtune's recipe: as shipped, and at its best with the whole step's tokens for itself."""
    config = preset_config(case.model)
    shipped = ("as shipped", (2, case.length), True, False, "rank 8, layers recomputed, eager")
    best = ("compiled, packed", (1, case.tokens), False, True, "rank 16, no recomputation, flex attention")
    for name, shape, recompute, compiled, note in (shipped, best):
        with fresh_memory():
            trainer = TorchtuneLoRA(config, 16 if compiled else 8, recompute=recompute, compiled=compiled)
            tokens = torch.randint(config["vocab_size"], shape, device="cuda")

            def forward_backward(trainer: TorchtuneLoRA = trainer, tokens: torch.Tensor = tokens) -> None:
                trainer.forward_backward(tokens, case.length)

            def step(run: Callable[[], None] = forward_backward, trainer: TorchtuneLoRA = trainer) -> None:
                run()
                trainer.optimizer.step()

            provider = f"torchtune LoRA {name}, one adapter, {shape[0]}x{shape[1]}"
            measure(records, case.name, provider, tokens.numel(), forward_backward, step, repeats, note)
            del trainer, forward_backward, step


def _gradients_through(base: BaseModel, batches: dict[int, list[Example]], budget: int) -> Callable[[], None]:
    """Forward, loss and backward of prepared microbatches, without routing."""
    prepared = []
    for microbatch in pack(batches, budget):
        n_labels = dict.fromkeys(microbatch.slot_labels, len(microbatch.label_rows))
        prepared.append(Inputs.of(microbatch, n_labels).to(base.device))

    def run() -> None:
        for each in prepared:
            hidden = base.hidden_states(each.tokens, each.positions, each.sequences)
            backward_cross_entropy(
                base.logits, hidden, each.rows, each.labels, each.weight, each.slots, len(batches),
                chunk=chunk_rows(base.spec.vocab_size, base.device), compiled=True,
            )  # fmt: skip

    return run


def _as_graph(run: Callable[[], None]) -> Callable[[], None]:
    """``run`` as a CUDA graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _notes(case: Case, microbatch: int | None = None) -> str:
    options = replace(case.options, microbatch=microbatch or case.options.microbatch)
    return f"{options}, layers compiled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="name of a preset")
    parser.add_argument("--case", action="append", help=f"see above; default {STANDARD_CASE}, can be repeated")
    parser.add_argument("--microbatch", type=int, default=8192, help="token budget of a microbatch")
    parser.add_argument("--quantize", choices=["nf4"], help="keep the base in 4 bits")
    parser.add_argument("--recompute", default="0", metavar="N|all", help="layers recomputed in backward")
    parser.add_argument("--optimizer-state", choices=OPTIMIZER_STATES, default="exact")
    parser.add_argument("--memory", action="store_true", help="plora with each of the options that save memory")
    parser.add_argument("--providers", nargs="*", default=["frozen", "plora", "bmm", "peft", "torchtune"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    try:
        recompute = True if args.recompute == "all" else int(args.recompute)
        options = Options(args.microbatch, recompute, args.optimizer_state, args.quantize)
        cases = [Case.parse(text, args.model, options) for text in args.case or [STANDARD_CASE]]
    except ValueError as error:
        parser.error(str(error))
    records = Records("step")
    print(f"{args.model} on {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    try:
        if args.memory or {"frozen", "plora", "bmm"} & set(args.providers):
            base = from_config(args.model, dtype="bf16", quantize=args.quantize, device="cuda")
            for case in cases:
                for name, run in (("frozen", frozen_base), ("plora", packed), ("bmm", bmm)):
                    if name in args.providers:
                        run(records, case, base, args.repeats)
            for each in MEMORY_OPTIONS if args.memory else []:
                packed(records, replace(cases[0], options=each), base, args.repeats)
            del base
        for name, run_alone in (("peft", peft_one_at_a_time), ("torchtune", torchtune_one_at_a_time)):
            if name in args.providers:
                gc.collect()
                torch.cuda.empty_cache()
                run_alone(records, cases[0], args.repeats)
    finally:
        records.write(args.json)
    print(records.table())


if __name__ == "__main__":
    main()
