"""A sweep from its configuration to its ranking: check, plan, train, score, report."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict

import torch

from plora.checkpoint.atomic import atomic_file
from plora.checkpoint.layout import EventLog, SweepLayout
from plora.config.components import instantiate, resolve
from plora.config.mistakes import ConfigError
from plora.config.run_checks import check_run
from plora.config.schema import SweepConfig
from plora.data import ChatTokenizer
from plora.engine.export import export_best
from plora.engine.logs import SweepLog
from plora.engine.ranking import Ranking
from plora.engine.recorder import Recorder
from plora.engine.scoring import Objective, SavedAdapters
from plora.engine.tasks import load_tasks
from plora.models import check as check_model
from plora.models import resolve as resolve_checkpoint
from plora.models.base import BaseModel
from plora.modules.packed import pack_adapters
from plora.planner import Pack, choose_checkpointing, load_trials, pack_trials
from plora.profiler import MemoryModel, format_bytes, host_free_bytes
from plora.report.html import write_report
from plora.report.info import SweepInfo
from plora.report.leaderboard import print_leaderboard
from plora.report.listener import Listeners
from plora.report.live import LiveView
from plora.report.metrics_file import MetricsFile, read_curve
from plora.report.results import to_dataframe, winner, write_csv
from plora.report.sweep_result import SweepResult
from plora.report.trackers import Tracker
from plora.search.study import SweepStudy, create_study
from plora.training.job import PackJob
from plora.training.loss import can_compile, chunk_rows
from plora.training.records import JobSettings

log = logging.getLogger(__name__)

# Packed generation is planned with room for this many rows at full length.
_GENERATION_ROWS = 32


class Sweep:
    """Carries a sweep out. Call the methods in their order, and ``cleanup`` whatever happens.

    Args:
        config: the checked configuration.
    """

    def __init__(self, config: SweepConfig) -> None:
        self.config = config
        self.layout = SweepLayout(config.output_dir)
        self._log = SweepLog()
        self._study: SweepStudy | None = None
        self._events: EventLog | None = None
        self._trackers: list[Tracker] = []
        self._started = time.perf_counter()

    def setup(self) -> None:
        """Check everything against the model, the data and the device; read the data; open the outputs.

        Raises:
            ConfigError: with every mistake that was found.
            ValueError: if data cannot be read.
        """
        config = self.config
        self.device = _device(config.device)
        self.spec = check_model(config.model.source, config.model.revision)
        errors, warnings = check_run(config, config.trials, self.spec)
        if errors:
            raise ConfigError(errors)
        self._trackers = [instantiate(settings) for settings in config.metric_loggers]
        self._log.open(self.layout.log, config.log_level)
        for warning in (*config.warnings, *warnings):
            log.warning("%s", warning)
        self.tokenizer = self._load_tokenizer()
        self.tasks = load_tasks(config, self.tokenizer)

    def plan(self) -> None:
        """Decide which trials train together under the device's free memory.

        Raises:
            ValueError: with the numbers, if a trial does not fit even alone.
        """
        config, packing = self.config, self.config.packing
        loads = load_trials(config.trials, self.spec, lambda trial: [len(e) for e in self.tasks[trial.name].train])
        self._compiles = can_compile(self.device)
        memory = MemoryModel(
            self.spec,
            dtype=config.model.compute_dtype,
            activation_checkpointing=config.model.activation_checkpointing is True,
            device=self.device.type,
            quantize=config.model.quantize,
            loss_chunk=chunk_rows(self.spec.vocab_size, self.device),
            compiled=self._compiles,
        )
        free = torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else host_free_bytes()
        options = {
            "token_budget": None if packing.tokens_per_microbatch == "auto" else packing.tokens_per_microbatch,
            "max_adapters": packing.max_adapters,
            "generation": self._generation_size(),
            "solver": packing.solver.lower(),
            "time_limit": packing.time_limit,
        }
        usable = int(free * packing.memory_fraction)
        if config.model.activation_checkpointing == "auto":
            self.memory, self.packing = choose_checkpointing(loads, memory, usable, **options)
        else:
            self.memory, self.packing = memory, pack_trials(loads, memory, usable, **options)
        self._open_outputs()
        self._announce_plan(free)

    def run(self) -> None:
        """Train every pack, then score what the objective needs, on validation data and once on test data."""
        assert self._study is not None
        assert self._events is not None
        config = self.config
        self.base = self._load_base()
        budget = min(pack.tokens for pack in self.packing.packs)
        self.objective = Objective(config, budget)
        self.recorder = Recorder(self.layout, self._study, self._events)
        with LiveView(config.trials) as view:
            listeners = Listeners([self.recorder, MetricsFile(self.layout), view, *self._trackers])
            try:
                for pack in self.packing.packs:
                    self._train(pack, listeners)
            finally:
                listeners.close()
        saved = SavedAdapters(self.base, self.tokenizer, self.layout, self.objective)
        self.ranking = Ranking(config, self.objective, self.recorder, self.tasks)
        self.ranking.score_validation(saved, [pack.trials for pack in self.packing.packs])
        self.ranking.score_test(saved)

    def report(self) -> SweepResult:
        """Write adapters, table and page, print the ranking, and return the results."""
        assert self._study is not None
        config = self.config
        exported = export_best(config, self.layout, self.base, self.tokenizer, self.ranking.order())
        ranked = self.ranking.summaries(exported)
        self._tell_study()
        info = self._info()
        write_csv(self.layout.results, ranked)
        curves = {trial.name: read_curve(self.layout.metrics(trial.name)) for trial in ranked}
        write_report(self.layout.report, ranked, info, curves)
        print_leaderboard(ranked, info)
        return SweepResult(to_dataframe(ranked), winner(ranked), self._study.study, config.output_dir)

    def cleanup(self) -> None:
        """Close what is open."""
        for tracker in self._trackers:
            tracker.close()
        if self._study is not None:
            self._study.close()
        if self._events is not None:
            self._events.close()
        self._log.close()

    def _open_outputs(self) -> None:
        config = self.config
        self.layout.create()
        with atomic_file(self.layout.config) as path:
            path.write_text(config.to_yaml(commit=self.spec.commit), encoding="utf-8")
        self._study = create_study(
            config.output_dir,
            config.trials,
            config.search.space,
            metric=config.objective.metric,
            direction=config.objective.direction,
        )
        self._events = EventLog(self.layout.events)
        self._events.event("sweep_started", trials=len(config.trials))
        for tracker in self._trackers:
            tracker.open(config.output_dir.resolve().name, self.layout.root)

    def _generation_size(self) -> tuple[int, int]:
        generation = self.config.evaluation.generation
        if generation is None:
            return (0, 0)
        prompts = [len(example.prompt) for task in self.tasks.values() for example in (*task.val, *task.test)]
        return _GENERATION_ROWS, max(prompts) + generation.max_new_tokens

    def _announce_plan(self, free: int) -> None:
        packs = self.packing.packs
        with atomic_file(self.layout.plan) as path:
            plan = {"version": 1, "free_bytes": free, "method": self.packing.method}
            plan["packs"] = [asdict(pack) | {"total_bytes": pack.memory.total} for pack in packs]
            path.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        recompute = ", activations recomputed" if self.memory.activation_checkpointing else ""
        plural = "s" * (len(packs) > 1)
        log.info("%d trials in %d pack%s on %s%s", len(self.config.trials), len(packs), plural, self.device, recompute)
        for number, pack in enumerate(packs):
            log.info(
                "pack %d: %d trials, up to %d tokens a microbatch, %s of %s free: %s",
                number, len(pack.trials), pack.tokens, format_bytes(pack.memory.total), format_bytes(free),
                pack.memory.describe(),
            )  # fmt: skip

    def _load_tokenizer(self) -> ChatTokenizer:
        given = self.config.tokenizer
        revision = self.spec.commit or given.revision if given.source == self.config.model.source else given.revision
        load = resolve(given.component)
        tokenizer: ChatTokenizer = load(
            str(resolve_checkpoint(given.source, revision, weights=False).folder),
            chat_template=given.chat_template,
            max_seq_len=given.max_seq_len,
            too_long=given.too_long,
        )
        return tokenizer

    def _load_base(self) -> BaseModel:
        model = self.config.model
        load = resolve(model.component)
        base: BaseModel = load(
            model.source,
            revision=self.spec.commit or model.revision,
            dtype=model.dtype,
            device=self.device,
            activation_checkpointing=self.memory.activation_checkpointing,
        )
        return base

    def _train(self, pack: Pack, listeners: Listeners) -> None:
        by_name = {trial.name: trial for trial in self.config.trials}
        trials = [by_name[name] for name in pack.trials]
        seen = {id(self.tasks[name]) for name in self.recorder.results}
        packed = pack_adapters(self.base.module, [trial.adapter for trial in trials])
        try:
            if self._compiles:
                self.base.compile_layers()
            settings = JobSettings(
                token_budget=pack.tokens,
                eval_token_budget=self.config.evaluation.batch_tokens,
                eval_every=self.config.evaluation.every,
                evaluate_base=any(id(self.tasks[trial.name]) not in seen for trial in trials),
            )
            scorers = self.objective.job_scorers(self.base, packed, self.tokenizer)
            PackJob(self.base, packed, trials, self.tasks, settings, listeners, scorers).run()
        finally:
            packed.unpack(self.base.module)

    def _tell_study(self) -> None:
        assert self._study is not None
        for trial in self.config.trials:
            self.ranking.tell(self._study, trial)

    def _info(self) -> SweepInfo:
        config, recorder = self.config, self.recorder
        return SweepInfo(
            name=config.output_dir.resolve().name,
            output_dir=config.output_dir,
            base_name=str(self.spec.source or config.model.source),
            base_revision=self.spec.commit,
            objective=config.objective.metric,
            direction=config.objective.direction,
            tokens=recorder.tokens,
            train_seconds=recorder.train_seconds,
            total_seconds=time.perf_counter() - self._started,
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(["device = 'cuda': torch sees no CUDA device; use device=cpu, or install torch for CUDA"])
    return torch.device(name)
