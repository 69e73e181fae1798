"""Decode steps as graphs, emulated on the CPU; on a GPU: see test_on_gpu.py."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from plora.models.attention import PackedSequences
from plora.models.base import BaseModel
from plora.models.cache import KVCache
from plora.training import decoding
from plora.training.budget import TokenBudget
from plora.training.decoding import Decoder, Graph
from plora.training.evaluation import BASE
from plora.training.generation import Prompt
from tests.training import toy
from tests.training.emulated_graph import EmulatedGraph
from tests.training.test_generation import frequent_stops, packed_with_effect, prompts, run

NEW = 40


@dataclass
class Device:
    """What an emulated device has seen.

    Args:
        eager: rows and attended positions of the steps that ran eagerly. captured: of those that were captured.
        graphs: all that were made.
        selects: times that finished rows were dropped.
    """

    eager: list[tuple[int, int]] = field(default_factory=list)
    captured: list[tuple[int, int]] = field(default_factory=list)
    graphs: list[weakref.ref[EmulatedGraph]] = field(default_factory=list)
    replays: int = 0
    selects: int = 0

    @property
    def held(self) -> int:
        return sum(graph() is not None for graph in self.graphs)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Graphs on the CPU, of few positions and for few steps, so that many are made."""
    seen, decode, select = Device(), KVCache.decode, KVCache.select
    capturing = False

    def watched_decode(cache: KVCache, attended: int) -> object:
        # Else something could be compiled, loaded or planned inside the capture.
        assert not capturing or seen.eager[-1] == (cache.rows, attended), "captured before it has run"
        (seen.captured if capturing else seen.eager).append((cache.rows, attended))
        return decode(cache, attended)

    def watched_select(cache: KVCache, rows: list[int]) -> None:
        assert not seen.held, "a graph of the old rows holds memory"
        seen.selects += 1
        select(cache, rows)

    def capture(step: Callable[[], None], where: torch.device) -> Graph:
        nonlocal capturing
        capturing = True
        try:
            graph = EmulatedGraph(step)
        finally:
            capturing = False
        seen.graphs.append(weakref.ref(graph))
        return graph

    def replay(graph: EmulatedGraph) -> None:
        seen.replays += 1
        original(graph)

    original = EmulatedGraph.replay
    monkeypatch.setattr(EmulatedGraph, "replay", replay)
    monkeypatch.setattr(KVCache, "decode", watched_decode)
    monkeypatch.setattr(KVCache, "select", watched_select)
    monkeypatch.setattr(decoding, "can_capture", lambda base, packed: True)
    monkeypatch.setattr(decoding, "capture", capture)
    for name, value in (("_SPACING", 12), ("_CAPTURE_STEPS", 3), ("_COMPACT_STEPS", 4)):
        monkeypatch.setattr(decoding, name, value)
    return seen


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """`run` as it is without graphs."""

    def eager(*args: object, **options: object) -> list[list[int]]:
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "can_capture", lambda base, packed: False)
            return run(*args, **options)  # type: ignore[arg-type]

    return eager


def test_graphs_generate_what_eager_steps_do(
    folders: dict[str, Path],
    family: str,
    device: Device,
    without: Callable[..., list[list[int]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ragged prompts of three adapters and the base, rows that end at different steps, several batches."""
    base = toy.load(folders[family])
    packed, rows = packed_with_effect(base), prompts(24)
    stop = frequent_stops(without(base, packed, rows, max_new_tokens=NEW))
    for options in ({}, {"cache_budget": TokenBudget(400, "generation")}):
        expected = without(base, packed, rows, max_new_tokens=NEW, stop=stop, **options)
        assert len({len(answer) for answer in expected}) > 4
        before = device.selects
        device.eager.clear()
        assert run(base, packed, rows, max_new_tokens=NEW, stop=stop, **options) == expected
        assert device.selects > before
    assert not caplog.records
    # Most steps are replayed, at several lengths, of several sets of rows.
    assert device.replays > 2 * len(device.eager)
    assert len({attended for _, attended in device.captured}) > 2
    assert len({rows for rows, _ in device.captured}) > 2
    assert not device.held
    packed.unpack(base.module)


def test_graphs_of_rows_that_fill_the_models_positions(
    base: BaseModel, device: Device, without: Callable[..., list[list[int]]]
) -> None:
    packed = packed_with_effect(base)
    rows = [Prompt(0, [7] * 50), *[Prompt(subject, [5 + subject] * 3) for subject in (0, 1, 2, BASE) for _ in range(5)]]
    expected = without(base, packed, rows, max_new_tokens=30, stop=())
    assert [len(answer) for answer in expected] == [15] + [30] * 20
    assert run(base, packed, rows, max_new_tokens=30, stop=()) == expected
    # The long row fills the cache: it leaves, though many steps are left and few rows have finished.
    assert device.selects == 2  # without graphs too
    assert max(attended for _, attended in device.captured) == base.spec.max_positions
    assert device.replays > 15


def test_adapters_may_change_between_calls(
    base: BaseModel, device: Device, without: Callable[..., list[list[int]]]
) -> None:
    packed, rows = packed_with_effect(base), prompts(9)
    first = run(base, packed, rows, max_new_tokens=NEW)
    for adapter in packed.adapters.values():
        for _, b in adapter.factors().values():
            b.neg_()
    packed.refresh()
    second = run(base, packed, rows, max_new_tokens=NEW)
    assert second != first
    assert second == without(base, packed, rows, max_new_tokens=NEW)


@pytest.mark.parametrize("error", [RuntimeError("no such thing in a capture\nat all"), torch.OutOfMemoryError("none")])
@pytest.mark.parametrize("late", [False, True])
def test_what_cannot_be_captured_runs_eagerly(
    error: RuntimeError,
    late: bool,
    base: BaseModel,
    device: Device,
    without: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tries = []

    def capture(step: Callable[[], None], where: torch.device) -> Graph:
        tries.append(late)
        if late:  # when the step has counted its token
            EmulatedGraph(step)
        raise error

    monkeypatch.setattr(decoding, "capture", capture)
    packed, rows, budget = packed_with_effect(base), prompts(12), TokenBudget(300, "generation")
    answers = run(base, packed, rows, max_new_tokens=NEW, cache_budget=budget)
    assert answers == without(base, packed, rows, max_new_tokens=NEW)
    assert len(tries) == 1
    assert budget.tokens == 300
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"generation goes on without CUDA graphs: {str(error).splitlines()[0]}"


def test_a_step_that_waits_for_the_device_is_not_captured(
    base: BaseModel, device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The emulation sees what a capture would refuse; the tests above rely on it."""
    packed, logits = packed_with_effect(base), base.logits
    monkeypatch.setattr(base, "logits", lambda hidden: logits(hidden * float(hidden.isfinite().all())))
    run(base, packed, prompts(5), max_new_tokens=NEW)
    assert device.replays == 0
    assert "_local_scalar_dense" in caplog.text


def test_memory_that_runs_out_between_graphs(
    base: BaseModel, device: Device, without: Callable[..., list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, rows = packed_with_effect(base), prompts()
    expected, decode = without(base, packed, rows, max_new_tokens=NEW), KVCache.decode

    def limited(cache: KVCache, attended: int) -> object:
        if cache.rows > 6 and attended > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(cache, attended)

    monkeypatch.setattr(KVCache, "decode", limited)
    assert run(base, packed, rows, max_new_tokens=NEW) == expected
    assert device.replays
    assert not device.held


def test_nothing_is_captured_for_a_few_steps(base: BaseModel, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_SPACING", 100)
    packed = packed_with_effect(base)
    for new, replays in ((4, 0), (5, 3)):  # the first token is the prompt's, the second is made eagerly
        run(base, packed, prompts(5), max_new_tokens=new, stop=())
        assert device.replays == replays


def test_graphs_are_not_for_the_cpu(base: BaseModel) -> None:
    decoder = Decoder(base, packed_with_effect(base))
    assert not decoder.uses_graphs
    assert [decoder.attended(needed, 100) for needed in (1, 57, 100)] == [1, 57, 100]


def test_an_answer_of_usual_length_takes_one_graph(base: BaseModel) -> None:
    decoder = Decoder(base, packed_with_effect(base))
    decoder.uses_graphs = True
    assert {decoder.attended(needed, 700) for needed in range(700 - 255, 701)} == {700}
    assert {decoder.attended(needed, 700) for needed in range(700 - 511, 701)} == {444, 700}


def test_batches_are_compacted_less_often_with_graphs(base: BaseModel) -> None:
    decoder = Decoder(base, packed_with_effect(base))
    assert decoder.pays_to_compact(rows=16, finished=2, left=1)
    assert not decoder.pays_to_compact(rows=16, finished=1, left=100)
    decoder.uses_graphs = True
    assert decoder.pays_to_compact(rows=16, finished=8, left=64)
    assert not decoder.pays_to_compact(rows=16, finished=7, left=100)
    assert not decoder.pays_to_compact(rows=16, finished=15, left=63)


def test_masked_positions_do_not_count(base: BaseModel) -> None:
    caches, hidden = [KVCache(2, 32) for _ in range(2)], []
    sequences, step = PackedSequences.from_lengths([5, 2]), torch.tensor([3, 4])
    with torch.no_grad():
        for cache, attended in zip(caches, (None, 20), strict=True):
            base.hidden_states(torch.arange(7), sequences.positions(), cache.prefill(sequences))
            place = cache.lengths.data_ptr()
            hidden.append(base.hidden_states(step, cache.lengths, cache.decode(attended)))
            assert cache.lengths.data_ptr() == place
            assert cache.lengths.tolist() == cache.host_lengths == [6, 3]
    torch.testing.assert_close(*hidden)
    for attended in (6, 33):
        with pytest.raises(ValueError, match=f"from 7 to 32 positions, got {attended}"):
            caches[0].decode(attended)
