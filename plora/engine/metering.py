"""What a job took, by part: set beside its prediction in the report, and learned from by the cost models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plora.engine.calibration import is_telling, today
from plora.engine.costs import CostModels
from plora.engine.planning import SweepPlan
from plora.planner import PlannedJob
from plora.profiler import MemorySample, RoundSample, fit_profile
from plora.report.accuracy import Accuracy, Compared
from plora.report.listener import Listener
from plora.training.peaks import PeakMemory
from plora.training.records import JobTimes, RoundRecord

# A job's first rounds compile what is new; one that takes this much longer than is usual for its work is one of them.
_SLOW = 1.5
_FIRST = 5
# Rounds that a profile learns from: the first of a job, and its last.
_LEARNED = 40
# Seconds below which evaluating and saving say nothing of the next time.
_TELLING = 0.5


@dataclass(frozen=True)
class MeasuredJob:
    """A finished job in seconds and bytes.

    Args:
        seconds: from packing its adapters to its last trial's end, evaluation of the base left out.
        start: what came before its first round, and what slow ones among the first took longer than usual.
        round_seconds: median of the rounds before the first trial left, those left out.
        evaluation: spent on scores.
        saving: spent on writing states.
        rounds: the others, steady ones.
        largest: tokens of its largest microbatch.
        labels: how many of those are labelled.
        allocated: peak bytes of live tensors; None where unknown.
        reserved: peak bytes of the allocator, CUDA graphs' among them; None on a CPU.
    """

    seconds: float
    start: float
    round_seconds: float
    evaluation: float
    saving: float
    rounds: tuple[RoundSample, ...]
    largest: int
    labels: int
    allocated: int | None
    reserved: int | None


class JobMeter(Listener):
    """Listens to one job.

    Args:
        job: what was planned.
        peaks: counts memory.
        clock: seconds, monotonic.
    """

    def __init__(self, job: PlannedJob, peaks: PeakMemory, clock: Callable[[], float] = time.perf_counter) -> None:
        self.job, self._peaks, self._clock = job, peaks, clock
        self._rounds: list[RoundRecord] = []
        peaks.reset()
        self._began = clock()

    def on_round(self, record: RoundRecord) -> None:  # type: ignore[override]
        """See ``Listener``."""
        self._rounds.append(record)

    def finish(self, times: JobTimes) -> MeasuredJob | None:
        """The job is over; None if it had no round."""
        seconds = self._clock() - self._began - times.base
        if not self._rounds:
            return None
        steady, excess = _steady(self._rounds)
        first = min(trial.end_round for trial in self.job.trials)
        opening = [record.seconds for record in steady if record.index <= first] or [r.seconds for r in steady]
        trained, peak = sum(record.seconds for record in self._rounds), self._peaks.allocated
        fullest = max(self._rounds, key=lambda record: record.tokens / record.microbatches)
        return MeasuredJob(
            seconds=seconds,
            start=max(0.0, seconds - trained - times.evaluation - times.saving) + excess,
            round_seconds=statistics.median(opening),
            evaluation=times.evaluation,
            saving=times.saving,
            rounds=tuple(_sample(record) for record in steady if record.seconds > 0),
            largest=-(-fullest.tokens // fullest.microbatches),
            labels=-(-fullest.labels // fullest.microbatches),
            allocated=peak if is_telling(peak) else None,
            reserved=self._peaks.reserved,
        )


def compare(job: PlannedJob, measured: MeasuredJob, more: float = 0.0) -> Accuracy:
    """A job's predictions beside what it took; ``more`` is predicted beside what it was planned with."""
    return Accuracy(
        f"job {job.number}",
        (
            *_memory(job, measured),
            Compared("step", job.round_seconds, measured.round_seconds, "s"),
            Compared("whole job", job.seconds + more, measured.seconds, "s"),
        ),
    )


def _memory(job: PlannedJob, measured: MeasuredJob) -> tuple[Compared, ...]:
    if measured.reserved is None:
        # On a CPU all that is known is what the process takes, which holds whatever the allocator has kept.
        return (Compared("memory of the process", job.memory_bytes, measured.allocated, "bytes", is_limit=True),)
    return (
        Compared("memory, live tensors", job.allocated_bytes, measured.allocated, "bytes"),
        Compared("memory, with the allocator's share", job.memory_bytes, measured.reserved, "bytes", is_limit=True),
    )


def learn(
    models: CostModels, planned: SweepPlan, job: PlannedJob, measured: MeasuredJob, *, compiled: bool = True
) -> None:
    """Add a job's measurements to the device's profile, and store it.

    ``compiled``: whether all that is compiled once per process was, when the job began.
    """
    memory = planned.memory
    before = models.profile(memory)
    prior = models.estimate(memory).cost(1)
    rounds = [*measured.rounds[:_LEARNED], *measured.rounds[_LEARNED:][-_LEARNED:]]
    if not rounds:
        return
    extras = _extras(planned, job, measured) | _start(planned, measured, compiled=compiled)
    peaks = []
    if measured.allocated is not None:
        sizes, rank = planned.sizes(job), max(trial.rank for trial in job.trials)
        reserved = None if memory.graph_tokens else measured.reserved  # the graphs' pool is in it
        state = sum(sizes[name] for name in planned.fullest(job))
        peaks.append(MemorySample(state, rank, measured.largest, measured.allocated, reserved, labels=measured.labels))
    models.keep(
        fit_profile(
            models.key(memory),
            memory,
            prior,
            rounds,
            peaks,
            today(),
            before=before,
            extras=extras,
        )
    )


def _start(planned: SweepPlan, measured: MeasuredJob, *, compiled: bool) -> dict[str, float]:
    """What a job says of starting one, or of compiling; too few rounds do not tell slow ones from steady ones."""
    if len(measured.rounds) < _FIRST:
        return {}
    # What evaluation has to make ready is counted with evaluation.
    start = measured.start + planned.cost.eval_start
    return {"start": start} if compiled else {"compile": max(0.0, start - planned.cost.start)}


def _extras(planned: SweepPlan, job: PlannedJob, measured: MeasuredJob) -> dict[str, float]:
    """What a job says of evaluating and saving, where it did enough of them to tell."""
    loads = {load.name: load for load in planned.problem.loads}
    members, cost, found = [loads[trial.name] for trial in job.trials], planned.cost, {}
    tokens = sum(load.eval_tokens for load in members)
    if tokens and measured.evaluation > _TELLING and not any(load.generated_tokens for load in members):
        labels = sum(load.eval_tokens * load.labels / load.tokens_per_step for load in members)
        found["per_eval_token"] = max(0.0, measured.evaluation - labels * cost.per_label / 2) / tokens
    params = [planned.memory.adapter_params(load.rank, load.target_modules) for load in members]
    predicted = sum(cost.save_seconds(count) for count in params)
    if measured.saving > _TELLING and predicted > 0:
        factor = measured.saving / predicted
        found |= {"save": factor * cost.save, "per_saved_param": factor * cost.per_saved_param}
    return found


def _steady(records: Sequence[RoundRecord]) -> tuple[list[RoundRecord], float]:
    """The rounds without those that compiled something or prepared graphs, and the seconds that slow ones among the
    first took more than is usual.
    """
    if len(records) <= _FIRST:
        return list(records), 0.0
    usual = statistics.median(record.seconds / record.tokens for record in records)
    slow = [r for r in records if r.index <= _FIRST and r.seconds > _SLOW * usual * r.tokens]
    steady = [record for record in records if not record.set_up and record not in slow]
    if len(steady) < _FIRST:
        return list(records), 0.0
    return steady, sum(max(0.0, record.seconds - usual * record.tokens) for record in slow)


def _sample(record: RoundRecord) -> RoundSample:
    return RoundSample(
        record.tokens, record.token_rank, record.live, record.params, record.microbatches, record.seconds,
        record.labels, record.squares, record.sequences,
    )  # fmt: skip
