"""A sweep from its configuration to its ranking: check, plan, train, score, report."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack

import torch

from plora.checkpoint.atomic import atomic_file
from plora.checkpoint.layout import EventLog, SweepLayout
from plora.config.components import resolve
from plora.config.schema import SweepConfig
from plora.engine.checks import check_sweep
from plora.engine.export import export_best
from plora.engine.logs import SweepLog
from plora.engine.planning import log_plan, make_plan, write_plan
from plora.engine.preview import preview, show_preview
from plora.engine.ranking import Ranking
from plora.engine.recorder import Recorder
from plora.engine.scoring import Objective, SavedAdapters
from plora.engine.tasks import load_tasks
from plora.models.base import BaseModel
from plora.modules.packed import pack_adapters
from plora.planner import Pack
from plora.profiler import format_bytes
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
from plora.training.job import PackJob
from plora.training.loss import can_compile
from plora.training.records import JobSettings

log = logging.getLogger(__name__)


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

    def plan(self) -> bool:
        """Decide which trials train together under the device's free memory; then load the base, and open the outputs.

        The outputs come last, so that a sweep that cannot start leaves nothing that the next one would not overwrite.

        Returns:
            Whether to go on: False where only the plan was asked for, which has then been shown.

        Raises:
            ValueError: with the numbers, if a trial does not fit even alone; if the base cannot be loaded.
        """
        if self.config.plan_only:
            show_preview(preview(self.config, self.checked.spec, self.tasks, self.checked.device), self.layout)
            return False
        self.planned = make_plan(self.config, self.checked.spec, self.tasks, self.checked.device)
        log_plan(self.planned)
        self.base = self._load_base()
        self._open_outputs()
        return True

    def run(self) -> None:
        """Train every pack, then score what the objective needs, on validation data and once on test data."""
        packs = self.planned.packing.packs
        self.objective = Objective(self.config, token_budget=min(pack.tokens for pack in packs))
        self.recorder = Recorder(self.layout, self.study, self._events, self.objective.name)
        before = time.perf_counter()
        with LiveView(self.config.trials) as view:
            listeners = Listeners([self.recorder, MetricsFile(self.layout), view, *self.checked.trackers])
            try:
                for pack in packs:
                    self._train(pack, listeners)
            finally:
                listeners.close()
        self._training_took = time.perf_counter() - before
        saved = SavedAdapters(self.base, self.checked.tokenizer, self.layout, self.objective)
        self.ranking = Ranking(self.config, self.objective, self.recorder, self.tasks)
        self.ranking.score_validation(saved, [pack.trials for pack in packs])
        self.ranking.tell(self.study)
        self.ranking.score_test(saved)

    def report(self) -> SweepResult:
        """Write adapters, table and page, print the ranking, and return the results."""
        exported = export_best(self.config, self.layout, self.base, self.checked.tokenizer, self.ranking.order())
        ranked, info = self.ranking.summaries(exported), self._info()
        write_csv(self.layout.results, ranked)
        curves = {trial.name: read_curve(self.layout.metrics(trial.name)) for trial in self.config.trials}
        write_report(self.layout.report, ranked, info, curves)
        self._events.event("sweep_ended", best=best.name if (best := winner(ranked)) else None)
        print_leaderboard(ranked, info)
        return SweepResult(to_dataframe(ranked), best, self.study.study, self.config.output_dir)

    def cleanup(self) -> None:
        """Close what is open."""
        self._opened.close()

    def _open_outputs(self) -> None:
        config = self.config
        self.layout.create()
        with atomic_file(self.layout.config) as path:
            path.write_text(config.to_yaml(commit=self.checked.spec.commit), encoding="utf-8")
        write_plan(self.layout.plan, self.planned)
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

    def _train(self, pack: Pack, listeners: Listeners) -> None:
        by_name = {trial.name: trial for trial in self.config.trials}
        trials = [by_name[name] for name in pack.trials]
        packed = pack_adapters(self.base.module, [trial.adapter for trial in trials])
        try:
            if can_compile(self.checked.device):
                self.base.compile_layers()
            settings = JobSettings(
                token_budget=pack.tokens,
                eval_token_budget=self.config.evaluation.batch_tokens,
                eval_every=self.config.evaluation.every,
                base_known=frozenset(self.recorder.base_scores),
            )
            scorers = self.objective.job_scorers(self.base, packed, self.checked.tokenizer)
            PackJob(self.base, packed, trials, self.tasks, settings, listeners, scorers).run()
        finally:
            packed.unpack(self.base.module)

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
        )

    def _costs(self) -> dict[str, str]:
        """What was predicted beside what it was."""
        plan, device = self.planned, self.checked.device
        source = " from data sheets" if plan.packing.estimated else ""
        took = duration(self._training_took)
        details = {"Training and evaluation": f"predicted{source} {duration(plan.seconds)}, took {took}"}
        if device.type == "cuda":
            predicted = max(pack.memory.total for pack in plan.packing.packs)
            peak = torch.cuda.max_memory_reserved(device)
            details["Memory"] = f"predicted {format_bytes(predicted)}, peak {format_bytes(peak)}"
        return details
