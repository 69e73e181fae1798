"""How far the cost models can be believed: predicted against measured, on packs that they were not fitted to.

    python benchmarks/bench_cost_model.py [--models Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-7B] [--json FILE]

Each model (random weights) is calibrated as a sweep does it, on rounds of one pack. Then other packs train rounds of
other make: one adapter to 32, ranks 4 to 128, 100 to 12000 tokens in sequences of 30 to 1024, all or a quarter of them
labelled, one microbatch or several. Errors are predicted over measured minus one. Steps run as in a sweep, on a GPU
with compiled layers and loss; the first runs of a new shape, which may compile, are left out and counted apart. At the
end some of the rounds calibrated with are measured again: no model can be closer than the machine is to itself.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from plora.engine.calibration import Calibrated, measure, peak_samples, samples
from plora.engine.costs import CostModels
from plora.models import from_config
from plora.models.base import BaseModel
from plora.profiler import MemoryModel, Profile, StepCost, calibration_rounds, fit_profile
from plora.profiler.memory import GIB
from plora.training.loss import can_compile, chunk_rows
from plora.training.peaks import PeakMemory
from plora.training.probe import MeasuredRound, PackProbe
from records import Records

# The mixes of ranks, and the tokens of a full microbatch: smaller where there is no GPU.
MIXES = {
    "cuda": ([16], [4] * 8, [32] * 6 + [64] * 2, [8] * 16 + [16] * 8 + [32] * 4 + [64] * 2 + [128] * 2),
    "cpu": ([16], [4] * 6, [32, 8], [8, 8, 16, 16, 4]),
}
TOKENS = {"cuda": (96, 700, 1500, 3000, 6000, 8000, 12000), "cpu": (24, 48, 96, 150, 220, 400)}
LENGTHS = {"cuda": (48, 100, 250, 600, 1024), "cpu": (16, 30, 60, 110)}
# Rounds calibrated with that are measured again.
AGAIN = 6
FULL = {"cuda": 8192, "cpu": 256}


@dataclass(frozen=True)
class Pack:
    """A round of other make than those calibrated with: sequences' lengths by adapter, and how they are trained."""

    ranks: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    token_budget: int
    labelled: float

    @property
    def name(self) -> str:
        """What tells it apart, short."""
        used = [own for own in self.lengths if own]
        tokens, longest = sum(map(sum, used)), max(map(max, used))
        return (
            f"{len(used)} of {len(self.ranks)} adapters, {tokens} tokens up to {longest}, {self.labelled:.0%} labelled"
        )


def packs(ranks: Sequence[int], kind: str, token_budget: int, seed: int) -> list[Pack]:
    """One for each total of tokens; ragged lengths, labels and who takes part are drawn with the seed."""
    draw, made = random.Random(seed), []
    for tokens in TOKENS[kind]:
        taking_part = [i for i in range(len(ranks)) if draw.random() < 0.6] or [0]
        lengths: list[list[int]] = [[] for _ in ranks]
        mean = draw.choice([length for length in LENGTHS[kind] if length <= tokens])
        left = tokens
        while left > 1:
            length = max(2, min(left, token_budget, round(mean * draw.uniform(0.4, 1.0))))
            lengths[draw.choice(taking_part)].append(length)
            left -= length
        made.append(Pack(tuple(ranks), tuple(map(tuple, lengths)), token_budget, draw.choice((1.0, 1.0, 0.5, 0.25))))
    return made


def fit(
    base: BaseModel, memory: MemoryModel, models: CostModels, peaks: PeakMemory, free: int, seconds: float, again: bool
) -> tuple[Profile, float, Calibrated]:
    """Calibrate as a sweep does, without touching the stored profiles; what that took, and what was measured."""
    began = time.perf_counter()
    estimated = models.estimate(memory).cost(1)
    chosen = calibration_rounds(memory, estimated, free)
    assert chosen is not None, "the model fits"
    found = measure(base, chosen.ranks, chosen.rounds, peaks, generates=False, again=again, most_seconds=seconds)
    took = time.perf_counter() - began
    extras = ", ".join(f"{name} {value:.3g}" for name, value in found.extras.items())
    print(f"calibrated in {took:.0f} s with {len(found.rounds)} rounds of {len(chosen.ranks)} adapters; {extras}")
    rounds, tops = samples(found.rounds), peak_samples(memory, found)
    profile = fit_profile(models.key(memory), memory, estimated, rounds, tops, "")
    for each, measured in zip(rounds, found.rounds, strict=True):
        print(
            f"  fitted: {each.tokens} tokens, {each.adapters} adapters, {each.microbatches} microbatches: "
            f"{each.seconds:.4f} s, predicted {each.predicted(profile.costs[1]):.4f} ({measured.warmup_seconds:.1f} s "
            f"of warm-up, {(measured.allocated or 0) / GIB:.2f} GiB, reserved {(measured.reserved or 0) / GIB:.2f})",
            flush=True,
        )
    print(f"  {profile.costs[1]}\n  {profile.memory}", flush=True)
    return profile, took, found


def predict(pack: Pack, measured: MeasuredRound, memory: MemoryModel, cost: StepCost) -> tuple[float, int, int]:
    """Seconds, allocated and reserved bytes of a round."""
    seconds = cost.round_seconds(
        measured.tokens, measured.token_rank, measured.adapters, measured.params, measured.microbatches,
        measured.labels, measured.squares,
    )  # fmt: skip
    state = sum(memory.adapter_bytes(rank) for rank in pack.ranks)
    parts = memory.parts_from_bytes(state, measured.largest, max(pack.ranks))
    return seconds, parts.allocated + memory.calibration.fixed, parts.total


def measure_model(records: Records, name: str, dtype: str, device: torch.device, options: argparse.Namespace) -> None:
    """Calibrate on one model, then compare on all packs."""
    models, peaks = CostModels(device), PeakMemory(device)
    free = int(models.free_bytes() * 0.95)
    base = from_config(name, dtype=dtype, device=device)
    base.set_activation_checkpointing(options.checkpointing)
    memory = MemoryModel(
        base.spec, dtype=dtype, device=device.type, loss_chunk=chunk_rows(base.spec.vocab_size, device),
        compiled=can_compile(device), activation_checkpointing=options.checkpointing,
    )  # fmt: skip
    print(f"{name} in {dtype} on {models.name}, torch {torch.__version__}", flush=True)
    profile, took, found = fit(base, memory, models, peaks, free, options.calibrate_seconds, options.start)
    case = name.rpartition("/")[2].lower()
    records.add(case, "calibration", "seconds", took, "s")
    calibrated, cost = replace(memory, calibration=profile.memory), profile.costs[1]
    errors: dict[str, list[float]] = {"time": [], "memory": [], "reserved": [], "machine's own": []}
    for seed, ranks in enumerate(MIXES[device.type][-options.mixes :]):
        state = sum(memory.adapter_bytes(rank) for rank in ranks)
        budget = FULL[device.type]
        while budget > 256 and calibrated.parts_from_bytes(state, budget, max(ranks)).total > free:
            budget //= 2
        with PackProbe(base, ranks, peaks) as probe:
            for pack in packs(ranks, device.type, budget, seed):
                measured = probe.round(pack.lengths, pack.token_budget, labelled=pack.labelled, repeats=options.repeats)
                seconds, allocated, reserved = predict(pack, measured, calibrated, cost)
                note = f"warm-up took {measured.warmup_seconds:.1f} s more, microbatches of {pack.token_budget} tokens"
                of = f"{case}/{pack.name}"
                records.add(of, "measured", "step", measured.seconds, "s", note)
                records.add(of, "predicted", "step", seconds, "s", note)
                errors["time"].append(seconds / measured.seconds - 1)
                shown = f"{measured.seconds:.4f} s, predicted {seconds / measured.seconds - 1:+.1%}"
                if measured.allocated is not None:
                    records.add(of, "measured", "peak", measured.allocated / GIB, "GiB", note)
                    records.add(of, "predicted", "peak", allocated / GIB, "GiB", note)
                    errors["memory"].append(allocated / measured.allocated - 1)
                    shown += f"; {measured.allocated / GIB:.2f} GiB, {allocated / measured.allocated - 1:+.1%}"
                if measured.reserved is not None:
                    errors["reserved"].append(reserved / measured.reserved - 1)
                    shown += f"; reserved {measured.reserved / GIB:.2f} GiB, {reserved / measured.reserved - 1:+.1%}"
                print(f"  {pack.name}: {shown} (warm-up {measured.warmup_seconds:.1f} s)", flush=True)
    with PackProbe(base, found.ranks, peaks) as probe:
        for each, before in zip(found.planned[:AGAIN], found.rounds, strict=False):
            now = probe.round(each.lengths, each.token_budget, labelled=each.labelled, repeats=options.repeats)
            errors["machine's own"].append(now.seconds / before.seconds - 1)
    for what, values in errors.items():
        if values:
            sizes = np.abs(values)
            for metric, value in (
                ("median", np.median(sizes)), ("p90", np.quantile(sizes, 0.9)), ("max", sizes.max()),
                ("mean_signed", np.mean(values)),
            ):  # fmt: skip
                records.add(case, f"{what} error", metric, float(value), "1", f"{len(values)} rounds")
    del base
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="names of presets")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--calibrate-seconds", type=float, default=90.0, help="rounds stop being added after these")
    parser.add_argument("--start", action="store_true", help="also measure what a job's start takes")
    parser.add_argument("--mixes", type=int, default=4, help="how many of the mixes of ranks")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in backward")
    parser.add_argument("--repeats", type=int, default=3, help="steady runs of each pack")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usual = {"cuda": ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"], "cpu": ["HuggingFaceTB/SmolLM2-135M"]}[device.type]
    records = Records("cost_model")
    try:
        for name in options.models or usual:
            measure_model(records, name, options.dtype, device, options)
            if device.type == "cuda":
                torch._dynamo.reset()
    finally:
        records.write(options.json)
    for row in records.rows:
        if "error" in row["provider"] or row["provider"] == "calibration":
            print(f"{row['case']}: {row['provider']}, {row['metric']}: {row['value']:.3g} {row['unit'].strip('1')}")


if __name__ == "__main__":
    main()
