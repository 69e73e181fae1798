"""A whole decoder layer with packed adapters as a multiple of the frozen one, both compiled.

    python benchmarks/bench_layer.py [--json FILE]

Forward and backward of a few layers of the real shape with random weights, 8192 tokens in sequences of 128,
ragged segments. What packing costs in a layer, attention, norms and activations included; the output head,
the loss and the optimizer are `bench_step.py`'s.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

import plora
from bench_step import STANDARD_MIX, fresh_memory, seconds
from plora.models import from_config
from plora.models.attention import PackedSequences
from plora.models.base import BaseModel
from plora.models.presets import preset_config
from plora.modules.packed import PackedAdapters
from records import Records

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.kernels.problem import ragged

MODELS = ("Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
MIXES = {"standard mix": STANDARD_MIX, "128 x r16": [16] * 128}
TOKENS, LENGTH, LAYERS, TURNS = 8192, 128, 4, 4
WARM_SECONDS = 1.0


def layers_pass(base: BaseModel, adapters: PackedAdapters | None, counts: list[int]) -> Callable[[], None]:
    """Forward and backward through all layers of ``base``."""
    sequences = PackedSequences.from_lengths([LENGTH] * (TOKENS // LENGTH), base.device)
    positions = torch.arange(LENGTH, device=base.device).repeat(TOKENS // LENGTH)
    options = {"device": base.device, "dtype": base.dtype}
    embedded = torch.randn(1, TOKENS, base.spec.dim, **options).requires_grad_()
    gradient = torch.randn(1, TOKENS, base.spec.dim, **options)

    def run() -> None:
        embedded.grad = None
        with adapters.route(counts) if adapters is not None else nullcontext():
            base.run_layers(embedded, positions[None], sequences).backward(gradient)

    return run


def sustained(run: Callable[[], None], repeats: int) -> float:
    """Median seconds of ``run`` at the clocks of a device that has done nothing else for a while, as in training."""
    return seconds(run, repeats, warmup=int(WARM_SECONDS / seconds(run, 3)))


def bench_layer(records: Records, model: str, repeats: int) -> None:
    """Each mix beside the frozen layer, in turns: a device that has grown warm is slower."""
    config = {**preset_config(model), "num_hidden_layers": LAYERS}
    frozen, packed = (from_config(config, dtype="bf16", device="cuda") for _ in range(2))
    name = model.rpartition("/")[2].lower()
    for mix, ranks in MIXES.items():
        configs = [plora.AdapterConfig(rank=rank, alpha=2 * rank, seed=i) for i, rank in enumerate(ranks)]
        with fresh_memory():
            adapters = plora.pack_adapters(packed.module, configs)
            for base in (frozen, packed):
                base.compile_layers()
            runs = layers_pass(frozen, None, []), layers_pass(packed, adapters, ragged(TOKENS, len(ranks)))
            turns = [[sustained(run, -(-repeats // TURNS)) / LAYERS for run in runs] for _ in range(TURNS)]
            alone, took = (statistics.median(times) for times in zip(*turns, strict=True))
            over = statistics.median(one / other for other, one in turns)
            adapters.unpack(packed.module)
        records.add(f"{name}/{mix}", "frozen", "layer_ms", alone * 1e3, "ms")
        records.add(f"{name}/{mix}", "plora", "layer_ms", took * 1e3, "ms")
        records.add(f"{name}/{mix}", "plora", "over_frozen", over, "x")
        print(f"{name}: {mix} {took * 1e3:.2f} ms, frozen {alone * 1e3:.2f} ms, {over:.3f}x", flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help=f"name of a preset; default {', '.join(MODELS)}")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    records = Records("layer")
    for model in args.model or MODELS:
        bench_layer(records, model, args.repeats)
    records.write(args.json)


if __name__ == "__main__":
    main()
