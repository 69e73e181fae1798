"""Rounds: as if alone, isolation, divergence, order of events, joining and leaving, running out of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plora.data.types import Task
from plora.models.base import BaseModel
from plora.modules.config import AdapterConfig
from plora.planner import PlannedJob, PlannedTrial
from plora.search.trial import Trial
from plora.training.budget import TokenBudget
from plora.training.evaluation import validation_losses
from plora.training.job import PackJob
from plora.training.live import evaluation_steps
from plora.training.metrics import Score
from plora.training.records import VAL_LOSS, JobSettings, Listener, Scorer, StepRecord
from tests.training import toy


def _assert_same_trajectory(one: toy.Recorder, other: toy.Recorder, trial: Trial) -> None:
    assert len(one.losses(trial.name)) == trial.max_steps >= 30
    torch.testing.assert_close(one.losses(trial.name), other.losses(trial.name), rtol=1e-5, atol=0)
    assert (one.flat(trial.name) - other.flat(trial.name)).norm() / other.flat(trial.name).norm() < 1e-4


def test_packed_training_follows_training_alone(
    folders: dict[str, Path], family: str, together: Callable[[str], toy.Recorder]
) -> None:
    trials, tasks = toy.mixed_trials()
    packed, base = together(family), toy.load(folders[family])
    for trial in trials:
        alone, _ = toy.train(base, [trial], tasks, token_budget=64)
        _assert_same_trajectory(packed, alone, trial)
    # Something was learned, or agreement would mean little.
    assert sum(packed.losses(t.name)[-8:].mean() - packed.losses(t.name)[:8].mean() for t in trials) < -0.5


def test_order_in_the_pack_and_microbatches_do_not_matter(
    folders: dict[str, Path], family: str, together: Callable[[str], toy.Recorder]
) -> None:
    trials, tasks = toy.mixed_trials()
    reordered, _ = toy.train(toy.load(folders[family]), trials[::-1], tasks, token_budget=30)
    for trial in trials:
        _assert_same_trajectory(reordered, together(family), trial)


def test_same_job_twice_is_the_same_bit_for_bit(base: BaseModel) -> None:
    trials, tasks = toy.mixed_trials(steps=6)
    first, second = (toy.train(base, trials, tasks)[0] for _ in range(2))
    for trial in trials:
        assert torch.equal(first.flat(trial.name), second.flat(trial.name))
        assert first.steps[trial.name] == second.steps[trial.name]


def test_lr_zero_keeps_the_base_loss_exactly(folders: dict[str, Path], family: str) -> None:
    base = toy.load(folders[family])
    trials, tasks = toy.mixed_trials(steps=8)
    trials[1] = replace(trials[1], lr=0.0)
    recorder, results = toy.train(base, trials, tasks, eval_every=0.5)
    of_base = recorder.evals["base first"][0].scores[VAL_LOSS]
    assert [each.scores[VAL_LOSS] for each in recorder.evals["b"]] == [of_base, of_base]
    assert results[1].scores[VAL_LOSS].value == of_base.value
    assert not any(b.any() for _, b in recorder.factors["b"].values())
    assert results[0].scores[VAL_LOSS].value < of_base.value


@pytest.mark.parametrize("factor", [0, 1])
def test_nan_of_one_adapter_changes_no_bit_of_the_others(base: BaseModel, factor: int) -> None:
    """In the step itself: gradients, losses, weights and moments of all others, for a NaN in A and in B."""
    trials, tasks = toy.mixed_trials(steps=8)
    outcomes = []
    for poison in (False, True):
        packed = toy.pack(base, [trial.adapter for trial in trials])
        job = PackJob(base, packed, trials, tasks, JobSettings(token_budget=128))
        job._admit()
        job._train_round()
        if poison:
            pairs = packed.adapters[2].factors()
            for pair in pairs.values():
                pair[factor].fill_(math.nan)
            packed.refresh()
        queued = job._train_round()
        (losses, norms, skipped), _ = queued.readback.wait()
        outcomes.append((losses, norms, packed, job))
        assert bool(skipped[2]) is poison
        assert math.isnan(losses[2]) is poison
        packed.unpack(base.module)
    (clean_losses, clean_norms, clean, _), (losses, norms, packed, _) = outcomes
    for slot in (0, 1, 3):
        span = clean.adapters[slot].range
        assert losses[slot] == clean_losses[slot]
        assert norms[slot] == clean_norms[slot]
        for flat in ("grad", "weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(packed.arena.attach(flat)[span], clean.arena.attach(flat)[span])


class _Interferer(Listener):
    """Poisons a trial's weights after a step of it was told."""

    def __init__(self, name: str, at: int) -> None:
        self.name, self.at = name, at
        self.steps: list[StepRecord] = []

    def on_step(self, trial: Trial, record: StepRecord) -> None:
        if trial.name == self.name:
            self.steps.append(record)
            if record.step == self.at:
                self.adapter.A.data.fill_(math.nan)


def test_divergence_is_seen_after_three_bad_steps_and_the_others_go_on(base: BaseModel) -> None:
    trials, tasks = toy.mixed_trials(steps=12)
    packed = toy.pack(base, [trial.adapter for trial in trials])
    listener = _Interferer("c", at=4)
    listener.adapter = packed.adapters[2]
    results = PackJob(base, packed, trials, tasks, JobSettings(token_budget=128, eval_every=None), listener).run()
    assert [result.status for result in results] == ["completed", "completed", "diverged", "completed"]
    # Told one round late: step 5 was on its way already, or not, when step 4 was told.
    bad = [record.step for record in listener.steps if record.skipped]
    assert len(bad) == 3
    assert results[2].steps == bad[-1] == listener.steps[-1].step < 12
    assert results[2].scores == {}
    assert math.isfinite(results[2].train_loss)
    assert packed.slots == []
    packed.unpack(base.module)


def test_two_bad_steps_are_no_divergence(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    trials, tasks = toy.mixed_trials(steps=8)
    logits = base.logits
    rounds = []

    def sometimes_nan(hidden: torch.Tensor) -> torch.Tensor:
        return logits(hidden) * (math.nan if len(rounds) in (2, 3, 5, 6) else 1.0)

    monkeypatch.setattr(base, "logits", sometimes_nan)
    original = PackJob._train_round
    monkeypatch.setattr(PackJob, "_train_round", lambda job: (rounds.append(0), original(job))[1])
    recorder, results = toy.train(base, trials[:1], tasks, evaluate_base=False)
    assert [record.skipped for record in recorder.steps["a"]] == [False, True, True, False, True, True, False, False]
    assert results[0].status == "completed"


def test_order_of_events_and_evaluations_at_fractions_of_each_training(base: BaseModel) -> None:
    trials, tasks = toy.mixed_trials(steps=10)
    recorder, results = toy.train(base, trials, tasks, eval_every=0.25)
    assert recorder.order[:2] == [("eval", "base first"), ("eval", "base second")]
    for trial, result in zip(trials, results, strict=True):
        mine = [event for event, name in recorder.order if name == trial.name]
        assert mine[0] == "start"
        assert mine[-2:] == ["eval", "finish"]
        total = trial.max_steps
        assert [r.step for r in recorder.steps[trial.name]] == list(range(1, total + 1))
        assert [e.step for e in recorder.evals[trial.name]] == sorted({round(f * total) for f in (0.25, 0.5, 0.75, 1)})
        steps_before_eval = mine[: mine.index("eval")].count("step")
        assert steps_before_eval == recorder.evals[trial.name][0].step
        assert result.evals == tuple(recorder.evals[trial.name])
        assert result.tokens == sum(record.tokens for record in recorder.steps[trial.name])


def test_final_validation_loss_is_that_of_the_final_weights(base: BaseModel) -> None:
    trials, tasks = toy.mixed_trials(steps=5)
    recorder, results = toy.train(base, trials, tasks)
    packed = toy.pack(base, [trials[0].adapter])
    packed.adapters[0].load_factors(recorder.factors["a"])
    again = validation_losses(base, packed, {0: tasks["a"].val}, TokenBudget(128, "test"))[0]
    assert again.value == results[0].scores[VAL_LOSS].value
    packed.unpack(base.module)


def test_waiting_trials_take_the_place_of_those_that_end(base: BaseModel) -> None:
    trials, tasks = toy.mixed_trials(steps=6)
    base_packed = toy.pack(base, [])
    recorder = toy.Recorder()
    settings = JobSettings(token_budget=128, max_live=2, eval_every=None)
    results = PackJob(base, base_packed, trials, tasks, settings, recorder).run()
    base_packed.unpack(base.module)
    assert max(record.live for record in recorder.rounds) == 2
    for trial in trials:
        alone, _ = toy.train(base, [trial], tasks)
        torch.testing.assert_close(recorder.losses(trial.name), alone.losses(trial.name), rtol=1e-5, atol=0)
    assert [result.trial.name for result in results] == [trial.name for trial in trials]
    assert recorder.rounds[-1].tokens_left == 0
    left = [record.tokens_left for record in recorder.rounds]
    assert left == sorted(left, reverse=True)


def test_a_plan_says_who_joins_when(base: BaseModel) -> None:
    trials, tasks = toy.mixed_trials(steps=6)
    a, b, c, d = trials
    steps = {trial.name: trial.max_steps for trial in trials}
    # b joins when d has left, c when a and b have.
    starts = {"a": 0, "d": 0, "b": steps["d"], "c": steps["d"] + steps["b"]}
    planned = [PlannedTrial(t.name, t.adapter.rank, starts[t.name], steps[t.name], 1.0) for t in (a, d, b, c)]
    job = PlannedJob(0, (0,), 128, tuple(planned), 0.0, 1.0, 0.1, 1, 1)
    packed = toy.pack(base, [a.adapter, d.adapter, b.adapter])
    packed.remove(2)  # room for b, so that nothing has to grow
    size = packed.arena.numel
    recorder = toy.Recorder()
    settings = JobSettings(token_budget=128, eval_every=None, evaluate_base=False, ready=job.ready)
    PackJob(base, packed, [a, d, b, c], tasks, settings, recorder).run()
    assert packed.arena.numel == size
    packed.unpack(base.module)
    events = [event for event in recorder.order if event[0] in ("start", "finish")]
    assert events == [
        ("start", "a"), ("start", "d"), ("finish", "d"), ("start", "b"), ("finish", "a"), ("finish", "b"),
        ("start", "c"), ("finish", "c"),
    ]  # fmt: skip
    for trial in trials:
        alone, _ = toy.train(base, [trial], tasks)
        torch.testing.assert_close(recorder.losses(trial.name), alone.losses(trial.name), rtol=1e-5, atol=0)


def test_who_may_join_waits_while_the_arena_has_no_room(base: BaseModel) -> None:
    trials, tasks = toy.mixed_trials(steps=4)
    a, b, c, d = trials
    packed = toy.pack(base, [a.adapter, d.adapter])
    size = packed.arena.numel
    recorder = toy.Recorder()

    def all_at_once(joined: Collection[str], ended: Collection[str]) -> list[str]:
        return [trial.name for trial in trials if trial.name not in joined]

    settings = JobSettings(token_budget=128, eval_every=None, ready=all_at_once)
    PackJob(base, packed, trials, tasks, settings, recorder).run()
    assert packed.arena.numel == size
    packed.unpack(base.module)
    assert sorted(recorder.results) == ["a", "b", "c", "d"]
    assert recorder.rounds[0].live == 2


def test_counters_count_real_tokens(base: BaseModel) -> None:
    trials, tasks = toy.mixed_trials(steps=4)
    recorder, _ = toy.train(base, trials, tasks)
    assert sum(r.tokens for r in recorder.rounds) == sum(s.tokens for many in recorder.steps.values() for s in many)
    assert all(record.padded_tokens == 0 and record.seconds > 0 for record in recorder.rounds)


def test_out_of_memory_halves_the_budget_and_repeats_the_round(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trials, tasks = toy.mixed_trials(steps=4)
    expected, _ = toy.train(base, trials, tasks, token_budget=50)
    hidden_states = base.hidden_states
    budgets = []

    def limited(tokens: torch.Tensor, positions: torch.Tensor, sequences: object) -> torch.Tensor:
        """Fails at the second microbatch, after gradients of the first have come in."""
        budgets.append(len(tokens))
        if len(budgets) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden_states(tokens, positions, sequences)  # type: ignore[arg-type]

    monkeypatch.setattr(base, "hidden_states", limited)
    recorder, _ = toy.train(base, trials, tasks, token_budget=100, evaluate_base=False)
    assert "100 tokens at a time: going on with 50" in caplog.text
    assert 50 < budgets[0] <= 100
    assert recorder.rounds[0].microbatches > 2
    for trial in trials:
        torch.testing.assert_close(recorder.losses(trial.name), expected.losses(trial.name), rtol=1e-5, atol=0)


def test_one_sequence_that_does_not_fit_is_an_error(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base, "hidden_states", never)
    trials, tasks = toy.mixed_trials(steps=4)
    with pytest.raises(torch.OutOfMemoryError):
        toy.train(base, trials, tasks, evaluate_base=False)


def test_keyboard_interrupt_leaves_and_the_pack_can_be_used_again(base: BaseModel) -> None:
    class Impatient(Listener):
        def on_step(self, trial: Trial, record: StepRecord) -> None:
            if record.step == 3:
                raise KeyboardInterrupt

    trials, tasks = toy.mixed_trials(steps=6)
    packed = toy.pack(base, [trials[0].adapter])
    with pytest.raises(KeyboardInterrupt):
        PackJob(base, packed, trials[:1], tasks, JobSettings(token_budget=128), Impatient()).run()
    packed.unpack(base.module)
    assert toy.train(base, trials[:1], tasks)[1][0].status == "completed"


def test_scorers_are_asked_for_all_trials_that_are_due(base: BaseModel) -> None:
    trials, tasks = toy.mixed_trials(steps=6)
    asked = []

    def score(due: dict[int, Task]) -> dict:  # type: ignore[type-arg]
        asked.append(sorted(due))
        return {slot: Score(float(slot), 0.0) for slot in due}

    packed = toy.pack(base, [trial.adapter for trial in trials])
    settings = JobSettings(token_budget=128, evaluate_base=False)
    results = PackJob(base, packed, trials, tasks, settings, scorers=[Scorer("slot", score)]).run()
    packed.unpack(base.module)
    assert asked == [[3], [0, 2], [1]]  # d ends after 4 steps, a and c after 6, b after 10
    assert [result.scores["slot"].value for result in results] == [0, 1, 2, 3]
    assert all(set(result.scores) == {VAL_LOSS, "slot"} for result in results)


@pytest.mark.parametrize(
    ("total", "every", "expected"),
    [
        (100, 0.1, range(10, 101, 10)),
        (3, 0.1, [1, 2, 3]),
        (7, None, [7]),
        (10, 1.0, [10]),
        (10, 0.3, [3, 6, 9, 10]),
        (5, 1e-12, range(1, 6)),
    ],
)
def test_evaluation_steps(total: int, every: float | None, expected: list[int]) -> None:
    assert evaluation_steps(total, every) == frozenset(expected)


def test_users_mistakes_are_named(base: BaseModel) -> None:
    trials, tasks = toy.mixed_trials()
    packed = toy.pack(base, [AdapterConfig(rank=2)])
    with pytest.raises(ValueError, match="different names"):
        PackJob(base, packed, [trials[0], trials[0]], tasks)
    with pytest.raises(ValueError, match="trial a has no task"):
        PackJob(base, packed, trials, {})
    with pytest.raises(ValueError, match="'empty' of trial a has no val examples"):
        PackJob(base, packed, trials[:1], {"a": Task("empty", tasks["a"].train, [], [])})
    with pytest.raises(ValueError, match="at most 1"):
        evaluation_steps(10, 2.0)
    packed.unpack(base.module)
