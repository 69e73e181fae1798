"""How far the cost models can be believed: predicted against measured, on packs that they were not fitted to.

    python benchmarks/bench_cost_model.py [--models Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-7B] [--json FILE]

Each model (random weights) is calibrated as a sweep does it, on rounds of one pack. Then other packs train rounds of
other make: one adapter to 32, ranks 4 to 128, 100 to 12000 tokens in sequences of 30 to 1024, all or a quarter of them
labelled, one microbatch or several. Errors are predicted over measured minus one. Steps run as in a sweep, on a GPU
with compiled layers and loss; the first runs of a new shape, which may compile, are left out and counted apart. Packs
that fit into the memory of the calibration's are put in its place, as a job exchanges adapters, so that nothing is
compiled anew; the peaks predicted are then those of the larger pack. In between some of the rounds calibrated with are
measured again: no model can be closer than the machine is to itself.

A CPU that other machines share is slower by a tenth or a half, for seconds or minutes at a time. There seconds are
those of a steady pace, see `steady.py`: the models are judged, not the neighbours. How far runs were from the usual
pace is shown as the machine's.

An interrupt (Ctrl-C, ``timeout -s INT``) ends it after the round at hand, with the figures so far.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from plora.engine.calibration import labels_of_largest, peak_samples, run_rounds, samples
from plora.engine.costs import CostModels
from plora.models import from_config
from plora.profiler import CalibrationRound, MemoryModel, Profile, StepCost, calibration_rounds, fit_profile
from plora.profiler.calibration import Calibration
from plora.profiler.memory import GIB
from plora.training.graphs import graph_tokens
from plora.training.loss import can_compile, chunk_rows
from plora.training.peaks import PeakMemory
from plora.training.probe import MeasuredRound, PackProbe
from records import Records
from steady import SteadyProbe, Yardstick

# The mixes of ranks: smaller where there is no GPU.
MIXES = {
    "cuda": ([16], [4] * 8, [32] * 6 + [64] * 2, [8] * 16 + [16] * 8 + [32] * 4 + [64] * 2 + [128] * 2),
    "cpu": ([16], [4] * 6, [32, 8], [8, 8, 16, 16, 4]),
}
TOKENS = {"cuda": (96, 700, 1500, 3000, 6000, 8000, 12000), "cpu": (24, 48, 96, 150, 220, 400)}
LENGTHS = {"cuda": (48, 100, 250, 600, 1024), "cpu": (16, 30, 60, 110)}
# Tokens of a full microbatch, at most; never more than those calibrated with have.
FULL = 8192
# Rounds calibrated with that are measured again.
AGAIN = 4


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


class Interrupt:
    """Whether the user has had enough: an exception in the midst of a compiled step may take the process down."""

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGINT, self._note)

    def _note(self, *_: object) -> None:
        self.came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("ending after this round", flush=True)


class Comparison:
    """Predictions beside measurements of one model's rounds.

    Args:
        records: takes the figures.
        case: the model's short name.
        memory: the memory model, calibrated.
        cost: the time model's coefficients, fitted.
        repeats: steady runs of each round.
        interrupt: ends it.
    """

    def __init__(
        self, records: Records, case: str, memory: MemoryModel, cost: StepCost, repeats: int, interrupt: Interrupt
    ) -> None:
        self.records, self.case, self.memory, self.cost, self.repeats = records, case, memory, cost, repeats
        self.interrupt = interrupt
        self.errors: dict[str, list[float]] = {"time": [], "memory": [], "reserved": [], "machine's own": []}

    def run(self, probe: PackProbe, held: Sequence[int], chosen: Sequence[Pack]) -> None:
        """Measure packs; ``held`` are the ranks that the probe has made room for."""
        for pack in chosen:
            if self.interrupt.came:
                return
            began = time.perf_counter()
            measured = probe.round(pack.lengths, pack.token_budget, labelled=pack.labelled, repeats=self.repeats)
            shown = self._compare(pack, held, measured)
            print(f"  {pack.name}: {shown} ({time.perf_counter() - began:.1f} s in all)", flush=True)

    def again(self, probe: PackProbe, rounds: Sequence[CalibrationRound], before: Sequence[MeasuredRound]) -> None:
        """Measure rounds once more."""
        for each, first in zip(rounds, before, strict=False):
            if self.interrupt.came:
                return
            now = probe.round(each.lengths, each.token_budget, labelled=each.labelled, repeats=self.repeats)
            self.errors["machine's own"].append(now.seconds / first.seconds - 1)

    def summarise(self, yardstick: Yardstick | None) -> None:
        """Add the errors' statistics to the records, and how the machine's pace differed from its median."""
        if yardstick is not None:
            self.errors["machine's pace"] = (np.array(yardstick.paces) / np.median(yardstick.paces) - 1).tolist()
        for what, values in self.errors.items():
            if values:
                sizes = np.abs(values)
                for metric, value in (
                    ("median", np.median(sizes)), ("p90", np.quantile(sizes, 0.9)), ("max", sizes.max()),
                    ("mean_signed", np.mean(values)),
                ):  # fmt: skip
                    self.records.add(self.case, f"{what} error", metric, float(value), "1", f"{len(values)} rounds")

    def _compare(self, pack: Pack, held: Sequence[int], measured: MeasuredRound) -> str:
        (sample,) = samples([measured])
        state = sum(self.memory.adapter_bytes(rank) for rank in held)
        parts = self.memory.parts_from_bytes(state, measured.largest, max(held), labels=labels_of_largest(measured))
        pool = self.memory.graph_bytes(measured.largest, max(held))  # which `PeakMemory` leaves out
        figures = (
            ("time", "step", measured.seconds, sample.predicted(self.cost), 1, "s"),
            ("memory", "peak", measured.allocated, parts.allocated, GIB, "GiB"),
            ("reserved", "reserved", measured.reserved, parts.total - pool, GIB, "GiB"),
        )
        note = f"{measured.warmup_seconds:.1f} s of warm-up, microbatches of {pack.token_budget} tokens"
        shown = []
        for what, metric, truth, predicted, unit, name in figures:
            if truth is not None:
                error = predicted / truth - 1
                self.errors[what].append(error)
                for provider, value in (("measured", truth), ("predicted", predicted)):
                    self.records.add(f"{self.case}/{pack.name}", provider, metric, value / unit, name, note)
                shown.append(f"{metric} {truth / unit:.4g} {name}, {error:+.1%}")
        return "; ".join(shown)


def fit(
    probe: PackProbe, chosen: Calibration, memory: MemoryModel, models: CostModels, options: argparse.Namespace,
    interrupt: Interrupt,
) -> tuple[Profile | None, list[MeasuredRound]]:  # fmt: skip
    """Calibrate as a sweep does, without touching the stored profiles; None where nothing was measured."""
    rounds = itertools.takewhile(lambda _: not interrupt.came, chosen.rounds)
    found = run_rounds(probe, rounds, options.repeats, options.calibrate_seconds)
    if not found:
        return None, found
    estimated, tops = models.estimate(memory).cost(1), peak_samples(memory, chosen.ranks, found)
    profile = fit_profile(models.key(memory), memory, estimated, samples(found), tops, "")
    for each, measured in zip(samples(found), found, strict=True):
        print(
            f"  fitted: {each.tokens} tokens, {each.adapters} adapters, {each.microbatches} microbatches: "
            f"{each.seconds:.4f} s, predicted {each.predicted(profile.costs[1]):.4f} ({measured.warmup_seconds:.1f} s "
            f"of warm-up, {(measured.allocated or 0) / GIB:.2f} GiB, reserved {(measured.reserved or 0) / GIB:.2f})",
            flush=True,
        )
    print(f"  {profile.costs[1]}\n  {profile.memory}", flush=True)
    return profile, found


def measure_model(
    records: Records, name: str, dtype: str, device: torch.device, options: argparse.Namespace, interrupt: Interrupt
) -> None:
    """Calibrate on one model, then compare on all packs."""
    models, peaks = CostModels(device), PeakMemory(device)
    free = int(models.free_bytes() * 0.95)
    base = from_config(name, dtype=dtype, device=device)
    base.set_activation_checkpointing(options.checkpointing)
    usual = graph_tokens(base.spec, device, dtype)
    most_tokens = usual if options.graph_tokens is None else options.graph_tokens
    memory = MemoryModel(
        base.spec, dtype=dtype, device=device.type, loss_chunk=chunk_rows(base.spec.vocab_size, device),
        compiled=can_compile(device), activation_checkpointing=options.checkpointing,
        graph_tokens=most_tokens,
    )  # fmt: skip
    print(f"{name} in {dtype} on {models.name}, torch {torch.__version__}", flush=True)
    chosen = calibration_rounds(memory, models.estimate(memory).cost(1), free)
    assert chosen is not None, "the model fits"
    case, began = name.rpartition("/")[2].lower(), time.perf_counter()
    yardstick = Yardstick(base) if device.type == "cpu" else None

    def probe_of(ranks: Sequence[int]) -> PackProbe:
        if yardstick is None:
            return PackProbe(base, ranks, peaks, graph_tokens=most_tokens)
        probe = SteadyProbe(base, ranks, peaks, graph_tokens=most_tokens)
        probe.yardstick = yardstick
        return probe

    def state(ranks: Sequence[int]) -> int:
        return sum(memory.adapter_bytes(rank) for rank in ranks)

    def packs_of(ranks: Sequence[int], held: Sequence[int]) -> list[Pack]:
        budget = min(FULL, chosen.rounds[0].token_budget)
        while budget > 256 and memory.parts_from_bytes(state(held), budget, max(held)).total > free:
            budget //= 2
        return packs(ranks, device.type, budget, seed=len(ranks))

    mixes = MIXES[device.type][-options.mixes :]
    inside = [ranks for ranks in mixes if state(ranks) <= state(chosen.ranks) and max(ranks) <= max(chosen.ranks)]
    with probe_of(chosen.ranks) as probe:
        profile, found = fit(probe, chosen, memory, models, options, interrupt)
        if profile is None:
            return
        took = time.perf_counter() - began
        print(f"calibrated in {took:.0f} s with {len(found)} rounds of {len(chosen.ranks)} adapters", flush=True)
        records.add(case, "calibration", "seconds", took, "s")
        calibrated = replace(memory, calibration=profile.memory)
        comparison = Comparison(records, case, calibrated, profile.costs[1], options.repeats, interrupt)
        for ranks in inside:
            probe.replace(ranks)
            comparison.run(probe, chosen.ranks, packs_of(ranks, chosen.ranks))
        probe.replace(chosen.ranks)
        comparison.again(probe, chosen.rounds[:AGAIN], found)
    for ranks in mixes:
        if ranks not in inside and not interrupt.came:
            with probe_of(ranks) as probe:
                comparison.run(probe, ranks, packs_of(ranks, ranks))
    comparison.summarise(yardstick)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="names of presets")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--calibrate-seconds", type=float, default=90.0, help="rounds stop being added after these")
    parser.add_argument("--graph-tokens", type=int, help="microbatches of up to so many run as CUDA graphs")
    parser.add_argument("--mixes", type=int, default=4, help="how many of the mixes of ranks")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in backward")
    parser.add_argument("--repeats", type=int, default=3, help="steady runs of each pack")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usual = {"cuda": ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"], "cpu": ["HuggingFaceTB/SmolLM2-135M"]}[device.type]
    records, interrupt = Records("cost_model"), Interrupt()
    try:
        for name in options.models or usual:
            if not interrupt.came:
                measure_model(records, name, options.dtype, device, options, interrupt)
                gc.collect()
    finally:
        records.write(options.json)
    for row in records.rows:
        if "error" in row["provider"] or row["provider"] == "calibration":
            print(f"{row['case']}: {row['provider']}, {row['metric']}: {row['value']:.3g} {row['unit'].strip('1')}")


if __name__ == "__main__":
    main()
