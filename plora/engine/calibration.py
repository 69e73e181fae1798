"""Measuring the device before a sweep is planned, and learning from every job that runs on it."""

from __future__ import annotations

import datetime
import logging
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch

from plora.engine.costs import CostModels
from plora.models.base import BaseModel
from plora.modules.config import computed_rank
from plora.profiler import (
    CalibrationRound,
    MemoryModel,
    MemorySample,
    Profile,
    RoundSample,
    StepCost,
    calibration_rounds,
    fit_profile,
)
from plora.profiler.memory import MIB
from plora.training.peaks import PeakMemory
from plora.training.probe import MeasuredRound, PackProbe

log = logging.getLogger(__name__)

# Rounds stop being added after so many seconds.
_MOST_SECONDS = 75.0
# Measuring pays where the sweep takes this many times as long.
PAYS = 20.0
# What packing, evaluating and saving add to the rounds.
_FIXED_SECONDS = 2.0
# Runs of each round where layers are compiled, and without.
_REPEATS = {"cuda": 3, "cpu": 1}
# Seconds of full rounds, once layers are compiled, before the others are measured: a GPU that has idled clocks higher
# than in a sweep (on an H100 full rounds took 6% longer when they were measured again later).
_WARM_SECONDS = {"cuda": 5.0, "cpu": 0.0}
_ROWS = 16
# Where decode steps run as a CUDA graph, so many that they pay for making it, as they do in a sweep.
_NEW_TOKENS = {"cuda": 128, "cpu": 8}
_LEAST_BYTES = 256 * MIB


@dataclass(frozen=True)
class Calibrated:
    """What a calibration found.

    Args:
        rounds: what was measured, by round.
        ranks: of the adapters.
        extras: costs that are not a round's, by their name in ``StepCost``.
    """

    rounds: tuple[MeasuredRound, ...]
    ranks: tuple[int, ...]
    extras: dict[str, float]


def pays(sweep_seconds: float, memory: MemoryModel, cost: StepCost, free_bytes: int) -> tuple[bool, float]:
    """Whether a sweep is long enough to be worth measuring for, and what measuring should take in seconds."""
    chosen = calibration_rounds(memory, cost, free_bytes)
    if chosen is None:
        return False, 0.0
    runs = 1 + _REPEATS[memory.device]
    fixed = _FIXED_SECONDS + _WARM_SECONDS[memory.device]
    seconds = fixed + runs * sum(_predicted(memory, cost, chosen.ranks, each) for each in chosen.rounds)
    return sweep_seconds >= PAYS * seconds, seconds


def calibrate(
    base: BaseModel,
    memory: MemoryModel,
    models: CostModels,
    free_bytes: int,
    peaks: PeakMemory,
    *,
    load_seconds: float,
    generates: bool = True,
) -> Profile | None:
    """Train a few rounds of made-up tokens on the device, fit the cost models to them and store the profile.

    Args:
        base: the base model, not packed.
        memory: the memory model to correct.
        models: the device's cost models, which keep the profile.
        free_bytes: bytes that may be taken, those of the base included.
        peaks: counts memory, the base's included.
        load_seconds: what loading the base took.
        generates: whether generation is to be measured too.

    Returns:
        The profile; None if not even the smallest pack fits.
    """
    estimated = models.estimate(memory).cost(1)
    chosen = calibration_rounds(memory, estimated, free_bytes)
    if chosen is None:
        log.warning("calibration: not even two small adapters fit; planning with estimates")
        return None
    log.info("calibrating on %s: %d short rounds of %d adapters", models.name, len(chosen.rounds), len(chosen.ranks))
    began = time.perf_counter()
    found = measure(
        base, chosen.ranks, chosen.rounds, peaks, generates=generates, optimizer_state=memory.moments,
        graph_tokens=memory.graph_tokens,
    )  # fmt: skip
    if not found.rounds:
        return None
    profile = fit_profile(
        models.key(memory),
        memory,
        estimated,
        samples(found.rounds),
        peak_samples(memory, found.ranks, found.rounds),
        today(),
        extras={**found.extras, "load": load_seconds},
    )
    models.keep(profile)
    cost = profile.costs[1]
    log.info(
        "calibrated in %.0f s: %.0f tokens/s in full rounds (estimated %.0f), stored in %s",
        time.perf_counter() - began, 1 / (cost.per_token + cost.per_label),
        1 / (estimated.per_token + estimated.per_label), models.folder,
    )  # fmt: skip
    return profile


def measure(
    base: BaseModel,
    ranks: Sequence[int],
    rounds: Sequence[CalibrationRound],
    peaks: PeakMemory,
    *,
    generates: bool = True,
    optimizer_state: str = "exact",
    graph_tokens: int = 0,
    most_seconds: float | None = None,
) -> Calibrated:
    """Run the rounds with one pack until they are through, time is up or memory is.

    Args:
        base: the base model, not packed.
        ranks: of the adapters.
        rounds: what to measure.
        peaks: counts memory.
        generates: whether generation is measured too.
        optimizer_state: see `PackedAdamW`.
        graph_tokens: see `MemoryModel`.
        most_seconds: rounds stop being added after these; None for what suits the device.
    """
    began = time.perf_counter()
    most_seconds = _MOST_SECONDS if most_seconds is None else most_seconds
    with PackProbe(base, ranks, peaks, optimizer_state, graph_tokens) as probe:
        found = run_rounds(probe, rounds, _REPEATS[base.device.type], most_seconds)
        in_time = time.perf_counter() - began <= most_seconds
        extras = _extras(probe, rounds, found, generates and in_time)
    if found and base.device.type == "cuda":
        # What a job repeats of it, now that the compiler's files are there, which also spare later processes the rest.
        with PackProbe(base, ranks, peaks, optimizer_state, graph_tokens) as probe:
            warmup = probe.round(rounds[0].lengths, rounds[0].token_budget, repeats=1).warmup_seconds
            eval_start = probe.evaluation(64, 64)[1]
            start = probe.pack_seconds + warmup + eval_start
        extras |= {"start": start, "eval_start": eval_start, "compile": 0.0}
    return Calibrated(tuple(found), tuple(ranks), extras)


def run_rounds(
    probe: PackProbe, rounds: Iterable[CalibrationRound], repeats: int, most_seconds: float
) -> list[MeasuredRound]:
    """Measure the rounds until they are through, ``most_seconds`` are up or memory is."""
    began = time.perf_counter()
    found: list[MeasuredRound] = []
    try:
        for each in rounds:
            if len(found) == 1:
                probe.keep_busy(each.lengths, each.token_budget, _WARM_SECONDS[probe.base.device.type])
            found.append(probe.round(each.lengths, each.token_budget, labelled=each.labelled, repeats=repeats))
            if time.perf_counter() - began > most_seconds:
                break
    except torch.OutOfMemoryError:
        log.warning("calibration ran out of memory after %d rounds: going on with those", len(found))
    return found


def samples(rounds: Sequence[MeasuredRound]) -> list[RoundSample]:
    """Measured rounds as the fit takes them."""
    return [
        RoundSample(
            each.tokens, each.token_rank, each.adapters, each.params, each.microbatches, each.seconds, each.labels,
            each.squares, each.sequences,
        )
        for each in rounds
    ]  # fmt: skip


def peak_samples(memory: MemoryModel, ranks: Sequence[int], rounds: Sequence[MeasuredRound]) -> list[MemorySample]:
    """Measured peaks of a pack of these ranks as the fit takes them; none where the device does not tell."""
    state = sum(memory.adapter_bytes(rank) for rank in ranks)
    return [
        MemorySample(state, max(ranks), each.largest, each.allocated, each.reserved, labels=labels_of_largest(each))
        for each in rounds
        if is_telling(each.allocated)
    ]


def labels_of_largest(measured: MeasuredRound) -> int:
    """Labelled tokens of a round's largest microbatch, if they are spread evenly."""
    return -(-measured.labels * measured.largest // measured.tokens)


def is_telling(peak: int | None) -> TypeGuard[int]:
    """Whether a measured peak says anything: on a CPU small ones are lost in what else the process does."""
    return peak is not None and peak >= _LEAST_BYTES


def today() -> str:
    """The date, ISO."""
    return datetime.date.today().isoformat()


def _extras(
    probe: PackProbe, rounds: Sequence[CalibrationRound], found: Sequence[MeasuredRound], generates: bool
) -> dict[str, float]:
    """What evaluation, saving, generation and starting cost beside the rounds."""
    if not found:
        return {}
    tokens, length = max(64, rounds[0].token_budget // 2), 64
    evaluation, compiling = probe.evaluation(tokens, length, labelled=1 / length)
    small, large = probe.packed.slots[0], probe.packed.slots[-1]
    params = {slot: probe.packed.adapters[slot].layout.numel for slot in (small, large)}
    seconds = {slot: probe.save(slot) for slot in params}
    per_saved = seconds[large] / params[large]
    generation = {}
    if generates:
        new = _NEW_TOKENS[probe.base.device.type]
        few, many = (probe.generation(rows, 16, new) / new for rows in (1, _ROWS))
        per_row = max(0.0, many - few) / (_ROWS - 1)
        generation = {"per_generated_token": per_row, "per_decode_step": max(0.0, few - per_row)}
    graphs = [each.warmup_seconds for each in found if each.microbatches * probe.graph_tokens >= each.tokens]
    # A round is warmed up by three runs, one of them without a graph.
    per_graph = 2 / 3 * statistics.median(graphs) if graphs else 0.0
    return {
        "per_graph": per_graph,
        "per_eval_token": evaluation / tokens,
        "save": max(0.0, seconds[small] - params[small] * per_saved),
        "per_saved_param": per_saved,
        "compile": compiling + sum(each.warmup_seconds for each in found),
        "start": probe.pack_seconds,
        **generation,
    }


def _predicted(memory: MemoryModel, cost: StepCost, ranks: Sequence[int], each: CalibrationRound) -> float:
    used = [(rank, own) for rank, own in zip(ranks, each.lengths, strict=True) if own]
    return cost.round_seconds(
        each.tokens,
        sum(computed_rank(rank) * sum(own) for rank, own in used),
        len(used),
        sum(memory.adapter_params(rank) for rank, _ in used),
        -(-each.tokens // each.token_budget),
        each.tokens * each.labelled,
    )
