"""A sweep from its configuration to its ranking: check, plan, train, score, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import TypeVar

from plora.checkpoint.atomic import atomic_file, write_text
from plora.checkpoint.disk import full_disk_explained
from plora.checkpoint.layout import EventLog, SweepLayout
from plora.config.components import resolve
from plora.config.schema import SweepConfig
from plora.engine.calibration import calibrate, pays
from plora.engine.checks import check_lengths, check_sweep
from plora.engine.costs import CostModels
from plora.engine.export import export_best
from plora.engine.logs import SweepLog
from plora.engine.metering import JobMeter, compare, learn
from plora.engine.planning import SweepPlan, base_seconds, log_plan, plan_elsewhere, plan_sweep, scoring_seconds
from plora.engine.preview import show_preview
from plora.engine.ranking import Ranking
from plora.engine.recorder import Recorder
from plora.engine.scoring import Objective, SavedAdapters
from plora.engine.tasks import load_tasks
from plora.models.base import BaseModel
from plora.modules.packed import PackedAdapters, pack_adapters
from plora.planner import PlannedJob
from plora.planner.preview import counted
from plora.report.accuracy import Accuracy, Compared, warnings, write_accuracy
from plora.report.html import write_report
from plora.report.info import SweepInfo
from plora.report.leaderboard import print_leaderboard
from plora.report.listener import Listeners
from plora.report.live import LiveView
from plora.report.metrics_file import MetricsFile, read_curve
from plora.report.results import to_dataframe, winner, write_csv
from plora.report.sweep_result import SweepResult
from plora.report.text import duration
from plora.search.study import SweepStudy, create_study
from plora.search.trial import Trial
from plora.training.job import PackJob
from plora.training.loss import can_compile, forget_compiled
from plora.training.peaks import PeakMemory
from plora.training.records import JobSettings

log = logging.getLogger(__name__)
T = TypeVar("T")


def _explains_full_disk(step: Callable[[Sweep], T]) -> Callable[[Sweep], T]:
    """A step of a sweep that says what is kept where the disk fills up."""

    @wraps(step)
    def take(sweep: Sweep) -> T:
        with full_disk_explained(sweep.layout.root, sweep._kept):
            return step(sweep)

    return take


class Sweep:
    """Carries a sweep out. Call the methods in their order, and ``cleanup`` whatever happens.

    Args:
        config: the checked configuration.
    """

    def __init__(self, config: SweepConfig) -> None:
        self.config = config
        self.layout = SweepLayout(config.output_dir)
        self._opened = ExitStack()
        self._started = time.perf_counter()
        self._base_took = 0.0
        self._is_compiled = False  # what is compiled once per process

    def setup(self) -> None:
        """Check everything against the model, the data and the device, then read the data.

        Raises:
            ConfigError: with every mistake that was found.
            ValueError: if data cannot be read.
        """
        sweep_log = SweepLog()
        self._opened.callback(sweep_log.close)
        sweep_log.open(self.config.log_level)
        self.checked = check_sweep(self.config)
        sweep_log.write_to(self.layout.log)
        for warning in self.checked.warnings:
            log.warning("%s", warning)
        self.tasks = load_tasks(self.config, self.checked.tokenizer)
        check_lengths(self.tasks, self.checked.spec)

    def plan(self) -> bool:
        """Decide which trials train together under the device's free memory; then load the base, and open the outputs.

        The outputs come last, so that a sweep that cannot start leaves nothing that the next one would not overwrite.

        Returns:
            Whether to go on: False where only the plan was asked for, which has then been shown.

        Raises:
            ValueError: with the numbers, if a trial does not fit even alone; if the base cannot be loaded.
        """
        if self.config.plan_only and self.config.hardware is not None:
            show_preview(plan_elsewhere(self.config, self.checked.spec, self.tasks), self.layout)
            return False
        self._models = CostModels(self.checked.device)
        self._free = self._models.free_bytes()
        self._peaks = PeakMemory(self.checked.device)
        self.planned = self._plan()
        if self.config.plan_only:
            show_preview(self.planned.plan, self.layout)
            return False
        self._load()
        self._calibrate()
        log_plan(self.planned)
        self._open_outputs()
        return True

    @_explains_full_disk
    def run(self) -> None:
        """Train every pack, then score what the objective needs, on validation data and once on test data."""
        jobs = self.planned.plan.jobs
        self.objective = Objective(self.config, token_budget=min(job.token_budget for job in jobs))
        self._accuracies: list[Accuracy] = []
        self.recorder = Recorder(self.layout, self.study, self._events, self.objective.name)
        before = time.perf_counter()
        with LiveView(self.config.trials) as view:
            listeners = Listeners([self.recorder, MetricsFile(self.layout), view, *self.checked.trackers])
            try:
                for job in jobs:
                    self._train(job, listeners)
            except KeyboardInterrupt:
                self._note_interruption()
                raise
            finally:
                listeners.close()
        trained = time.perf_counter()
        saved = SavedAdapters(self.base, self.checked.tokenizer, self.layout, self.objective)
        self.ranking = Ranking(self.config, self.objective, self.recorder, self.tasks)
        self.ranking.score_validation(saved, [group for job in jobs for group in self.planned.groups(job)])
        self.ranking.tell(self.study)
        self.ranking.score_test(saved)
        self._accuracies.append(self._whole(trained - before, time.perf_counter() - trained))

    @_explains_full_disk
    def report(self) -> SweepResult:
        """Write adapters, table and page, print the ranking, and return the results."""
        exported = export_best(self.config, self.layout, self.base, self.checked.tokenizer, self.ranking.order())
        ranked, info = self.ranking.summaries(exported), self._info()
        write_csv(self.layout.results, ranked)
        write_accuracy(self.layout.predictions_table, self._accuracies)
        curves = {trial.name: read_curve(self.layout.metrics(trial.name)) for trial in self.config.trials}
        write_report(self.layout.report, ranked, info, curves)
        self._events.event("sweep_ended", best=best.name if (best := winner(ranked)) else None)
        print_leaderboard(ranked, info)
        return SweepResult(to_dataframe(ranked), best, self.study.study, self.config.output_dir)

    @_explains_full_disk  # closing a file writes what is left of it
    def cleanup(self) -> None:
        """Close what is open."""
        self._opened.close()

    def _open_outputs(self) -> None:
        config = self.config
        self.layout.create()
        with atomic_file(self.layout.config) as path:
            path.write_text(config.to_yaml(commit=self.checked.spec.commit), encoding="utf-8")
        write_text(self.layout.plan, self.planned.plan.to_json())
        self.study: SweepStudy = create_study(
            config.output_dir,
            config.trials,
            config.search.space,
            metric=config.objective.metric,
            direction=config.objective.direction,
        )
        self._opened.callback(self.study.close)
        self._events = EventLog(self.layout.events)
        self._opened.callback(self._events.close)
        self._events.event("sweep_started", trials=len(config.trials))
        for tracker in self.checked.trackers:
            self._opened.callback(tracker.close)
            tracker.open(config.output_dir.resolve().name, self.layout.root)

    def _load_base(self) -> BaseModel:
        model = self.config.model
        base: BaseModel = resolve(model.component)(
            model.source,
            revision=self.checked.spec.commit or model.revision,
            dtype=model.dtype,
            device=self.checked.device,
            activation_checkpointing=self.planned.memory.activation_checkpointing,
        )
        return base

    def _plan(self, *, is_loaded: bool = False) -> SweepPlan:
        return plan_sweep(
            self.config, self.checked.spec, self.tasks, self._models, free=self._free, is_loaded=is_loaded
        )

    def _load(self) -> None:
        """Load the base, and note what that takes."""
        began = time.perf_counter()
        self.base = self._load_base()
        self._load_took, self._load_predicted = time.perf_counter() - began, self.planned.cost.load
        self._compile_predicted = self.planned.cost.compile

    def _calibrate(self) -> None:
        """Measure the device where no profile is stored and it pays; then plan again with what was measured."""
        wanted, planned, models = self.config.packing.calibrate, self.planned, self._models
        if wanted == "never" or models.profile(planned.memory) is not None:
            return
        usable = planned.problem.free_bytes
        worth, seconds = pays(planned.plan.makespan, planned.memory, models.estimate(planned.memory).cost(1), usable)
        if not worth and wanted == "auto":
            log.info(
                "not calibrated: that takes about %s, too long for a sweep of about %s (packing.calibrate=always does "
                "it); times are estimates, and the next sweep learns from this one",
                duration(seconds), duration(planned.plan.makespan),
            )  # fmt: skip
            return
        generates = self.config.evaluation.generation is not None
        profile = calibrate(
            self.base, planned.memory, models, usable, self._peaks, load_seconds=self._load_took, generates=generates
        )
        if profile is not None:
            self.planned, self._compile_predicted = self._plan(is_loaded=True), 0.0
            self._is_compiled = True
            self.base.set_activation_checkpointing(self.planned.memory.activation_checkpointing)

    def _train(self, job: PlannedJob, listeners: Listeners) -> None:
        meter = JobMeter(job, self._peaks)
        by_name = {trial.name: trial for trial in self.config.trials}
        trials = [by_name[trial.name] for trial in job.trials]
        packed = self._pack(job, by_name)
        try:
            if can_compile(self.checked.device):
                self.base.compile_layers()
            settings = JobSettings(
                token_budget=job.token_budget,
                eval_token_budget=self.config.evaluation.batch_tokens,
                eval_every=self.config.evaluation.every,
                base_known=frozenset(self.recorder.base_scores),
                ready=job.ready,
                optimizer_state=self.config.packing.optimizer_state,
                graph_tokens=self.planned.memory.graph_tokens,
            )
            scorers = self.objective.job_scorers(self.base, packed, self.checked.tokenizer)
            heard = Listeners([*listeners.listeners, meter])
            running = PackJob(self.base, packed, trials, self.tasks, settings, heard, scorers)
            running.run()
        finally:
            packed.unpack(self.base.module)
            forget_compiled(self.checked.device)
        measured = meter.finish(running.times)
        self._base_took += running.times.base
        if measured is not None:
            more = 0.0 if self._is_compiled else self._compile_predicted
            if running.times.base:  # which paid for the first evaluation
                more -= self.planned.cost.eval_start
            self._accuracies.append(compare(job, measured, more))
            if self.config.packing.calibrate != "never":
                learn(self._models, self.planned, job, measured, compiled=self._is_compiled)
        self._is_compiled = True

    def _pack(self, job: PlannedJob, trials: Mapping[str, Trial]) -> PackedAdapters:
        """The base with an arena as large as the job ever needs; what does not start in it makes room for what does."""
        fullest, first = self.planned.fullest(job), set(job.ready((), ()))
        packed = pack_adapters(
            self.base.module, [trials[name].adapter for name in fullest], capacity=max(8, 2 * len(job.trials))
        )
        for slot, name in zip(packed.slots, fullest, strict=True):
            if name not in first:
                packed.remove(slot)
        return packed

    def _note_interruption(self) -> None:
        self._events.event("sweep_interrupted", completed=self._completed())
        log.warning("interrupted: %s", self._kept())

    def _completed(self) -> list[str]:
        """The trials whose weights are on disk."""
        return [trial.name for trial in self.config.trials if self.layout.state(trial.name).exists()]

    def _kept(self) -> str:
        """What there is of a sweep that breaks off."""
        done = self._completed()
        kept = f"their weights are in {self.layout.checkpoints}; " if done else ""
        return (
            f"{len(done)} of {len(self.config.trials)} trials had completed; {kept}a sweep is not resumed, so start it "
            "again in another output_dir"
        )

    def _whole(self, training: float, scoring: float) -> Accuracy:
        """The sweep's predictions beside what it took; a calibration is no part of either."""
        plan, cost = self.planned.plan, self.planned.cost
        jobs = plan.makespan - plan.load_seconds + self._compile_predicted - (cost.eval_start if self._base_took else 0)
        base, scores = base_seconds(self.tasks, cost), scoring_seconds(self.config, self.tasks, cost)
        took = self._load_took + training + scoring
        return Accuracy(
            "sweep",
            (
                Compared("loading the base", self._load_predicted, self._load_took, "s"),
                Compared("scoring the base", base, self._base_took, "s"),
                Compared("jobs", jobs, training - self._base_took, "s"),
                Compared("scores at the end", scores, scoring, "s"),
                Compared("everything", self._load_predicted + base + jobs + scores, took, "s"),
            ),
        )

    def _info(self) -> SweepInfo:
        config, recorder, spec = self.config, self.recorder, self.checked.spec
        return SweepInfo(
            name=config.output_dir.resolve().name,
            output_dir=config.output_dir,
            base_name=self.base.loadable_name,
            base_revision=spec.commit,
            objective=config.objective.metric,
            direction=config.objective.direction,
            tokens=recorder.tokens,
            train_seconds=recorder.train_seconds,
            total_seconds=time.perf_counter() - self._started,
            details=self._costs(),
            accuracies=tuple(self._accuracies),
        )

    def _costs(self) -> dict[str, str]:
        """What the plan was, and where it was off."""
        plan = self.planned.plan
        found = {"Plan": f"{counted(len(plan.jobs), 'job')} by {plan.method}, gap {plan.gap:.1%}"}
        off = warnings(self._accuracies, plan.estimated)
        for line in off:
            log.warning("%s", line)
        return found | {"Off by more than 15%": "; ".join(off)} if off else found
