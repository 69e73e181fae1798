"""Experiment trackers: one run per trial, all of a sweep in one group.

A tracker is a guest: whatever it raises is logged once, switches it off and never reaches training.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from plora.report.listener import EvalRecord, Listener, StepRecord
from plora.report.results import settings_of, state_of

_log = logging.getLogger(__name__)


class Tracker(Listener):
    """What the trackers share: their runs by trial, how often they log, and that they never raise.

    Making one checks that its package is installed and touches nothing else; ``open`` names the sweep. A subclass
    says how a run is started, logged to and ended.

    Args:
        log_every: log a training step every so many steps; evaluations and the last step are always logged.

    Raises:
        ValueError: if the package is missing or ``log_every`` is not a positive whole number.
    """

    package = ""
    """The module that must be importable."""

    def __init__(self, log_every: int = 1) -> None:
        kind = type(self).__name__
        if isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 1:
            raise ValueError(f"{kind}: log_every must be a positive whole number, got {log_every!r}")
        if not _is_installed(self.package):
            raise ValueError(
                f"{kind} needs the package {self.package!r}, which is not installed: "
                f"pip install {self.package} (or plora[trackers]), or remove metric_logger"
            )
        self._log_every = log_every
        self._runs: dict[str, Any] = {}
        self._enabled = True
        self.sweep = "sweep"
        self.directory = Path()

    def open(self, sweep: str, directory: str | Path) -> None:
        """Names the group that the runs belong to, and the sweep's output directory."""
        self.sweep, self.directory = sweep, Path(directory)

    def start_run(self, trial: Any, settings: Mapping[str, Any], total_steps: int) -> Any:
        """Starts the trial's run and returns a handle to it."""
        raise NotImplementedError

    def log(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        """Logs numbers of one step."""
        raise NotImplementedError

    def end_run(self, run: Any, settings: Mapping[str, Any], state: str, summary: Mapping[str, float]) -> None:
        """Ends the run; ``state`` is ``complete``, ``diverged``, ``failed`` or ``interrupted``."""
        raise NotImplementedError

    def on_start(self, trial: Any, total_steps: int) -> None:
        """See ``Listener``."""

        def start() -> None:
            self._runs[trial.name] = self.start_run(trial, settings_of(trial), total_steps)

        self._guarded(start)

    def on_step(self, trial: Any, record: StepRecord) -> None:
        """See ``Listener``."""
        if record.step % self._log_every and record.step != record.total:
            return
        metrics = {
            "train/loss": float(record.loss),
            "train/lr": float(record.lr),
            "train/grad_norm": float(record.grad_norm),
            "train/tokens": float(record.tokens),
        }
        self._guarded(lambda: self.log(self._runs[trial.name], record.step, metrics))

    def on_eval(self, trial: Any | None, record: EvalRecord) -> None:
        """See ``Listener``; the base model has no run."""
        if trial is not None:
            numbers = {f"eval/{name}": float(score.value) for name, score in record.scores.items()}
            self._guarded(lambda: self.log(self._runs[trial.name], record.step, numbers))

    def on_finish(self, trial: Any, result: Any, adapter: Any) -> None:
        """See ``Listener``."""
        self._guarded(lambda: self._end(trial.name, trial, result))

    def close(self) -> None:
        """Ends the runs that are still open."""
        for name in list(self._runs):
            self._guarded(partial(self._end, name, None, None))

    def _end(self, name: str, trial: Any, result: Any) -> None:
        run = self._runs.pop(name)
        state = "interrupted" if result is None else state_of(result)
        self.end_run(run, {} if trial is None else settings_of(trial), state, _summary(result))

    def _guarded(self, action: Callable[[], None]) -> None:
        if not self._enabled:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker does, training goes on
            self._enabled = False
            self._runs.clear()
            _log.warning(
                "%s failed and is switched off for the rest of the sweep; training goes on: %s: %s",
                type(self).__name__,
                type(error).__name__,
                error,
            )


class TensorBoardLogger(Tracker):
    """Writes TensorBoard event files, one run directory per trial, with the settings in the HPARAMS tab.

    Args:
        log_dir: where to; None for ``tensorboard/`` in the sweep's output directory.
        log_every: see ``Tracker``.
    """

    package = "tensorboard"

    def __init__(self, log_dir: str | None = None, log_every: int = 1) -> None:
        super().__init__(log_every)
        self._log_dir = log_dir

    def start_run(self, trial: Any, settings: Mapping[str, Any], total_steps: int) -> Any:
        """See ``Tracker``."""
        from torch.utils.tensorboard import SummaryWriter

        root = Path(self._log_dir) / self.sweep if self._log_dir else self.directory / "tensorboard"
        return SummaryWriter(str(root / trial.name))

    def log(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        for name, value in metrics.items():
            run.add_scalar(name, value, step)

    def end_run(self, run: Any, settings: Mapping[str, Any], state: str, summary: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        values = {f"final/{name}": value for name, value in summary.items()}
        if settings:
            run.add_hparams({**_plain(settings), "state": state}, values, run_name=".")
        run.close()


class WandBLogger(Tracker):
    """Logs to Weights & Biases, one run per trial in a group named after the sweep.

    The runs are its own: a run that the process has open already is left alone.

    Args:
        project: W&B project.
        entity: user or team; None for the account's default.
        mode: ``online``, ``offline`` or ``disabled``; None leaves it to W&B (``WANDB_MODE``).
        log_every: see ``Tracker``.
        settings: further arguments of ``wandb.init``, such as ``tags``.
    """

    package = "wandb"

    def __init__(
        self,
        project: str = "plora",
        entity: str | None = None,
        mode: str | None = None,
        log_every: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(log_every)
        self._settings = {**settings, "project": project, "entity": entity, "mode": mode}

    def start_run(self, trial: Any, settings: Mapping[str, Any], total_steps: int) -> Any:
        """See ``Tracker``."""
        wandb = importlib.import_module("wandb")
        run = wandb.init(
            **self._settings,
            group=self.sweep,
            name=trial.name,
            config={**settings, "total_steps": total_steps},
            dir=str(self.directory),
            reinit="create_new",  # a run beside the others, never the process-wide one
        )
        # Evaluations may arrive after later steps; with an axis of their own none is dropped.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def log(self, run: Any, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        run.log({"step": step, **metrics})

    def end_run(self, run: Any, settings: Mapping[str, Any], state: str, summary: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        run.summary.update({"state": state, **{f"final/{name}": value for name, value in summary.items()}})
        run.finish(exit_code=0 if state in ("complete", "diverged") else 1)


class MLflowLogger(Tracker):
    """Logs to MLflow, one run per trial, nested under a run named after the sweep.

    Args:
        experiment: MLflow experiment, made if absent.
        tracking_uri: server or folder; None leaves it to MLflow (``MLFLOW_TRACKING_URI``).
        log_every: see ``Tracker``.
    """

    package = "mlflow"

    def __init__(self, experiment: str = "plora", tracking_uri: str | None = None, log_every: int = 1) -> None:
        super().__init__(log_every)
        self._experiment, self._tracking_uri = experiment, tracking_uri
        self._client: Any = None
        self._experiment_id: str | None = None
        self._parent_id: str | None = None

    def start_run(self, trial: Any, settings: Mapping[str, Any], total_steps: int) -> str:
        """See ``Tracker``."""
        if self._client is None:
            self._open_parent()
        tags = {"mlflow.parentRunId": self._parent_id, "plora.sweep": self.sweep}
        run_id = self._client.create_run(self._experiment_id, run_name=trial.name, tags=tags).info.run_id
        for name, value in {**_plain(settings), "total_steps": total_steps}.items():
            self._client.log_param(run_id, name, value)
        return run_id

    def log(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        for name, value in metrics.items():
            if math.isfinite(value):  # some of its stores refuse others
                self._client.log_metric(run, name, value, step=step)

    def end_run(self, run: str, settings: Mapping[str, Any], state: str, summary: Mapping[str, float]) -> None:
        """See ``Tracker``."""
        for name, value in summary.items():
            if math.isfinite(value):
                self._client.log_metric(run, f"final/{name}", value)
        self._client.set_tag(run, "plora.state", state)
        self._client.set_terminated(run, status=_MLFLOW_STATUS.get(state, "KILLED"))

    def close(self) -> None:
        """Ends the runs that are still open, the sweep's included."""
        super().close()
        if self._parent_id is not None:
            parent, self._parent_id = self._parent_id, None
            self._guarded(lambda: self._client.set_terminated(parent))

    def _open_parent(self) -> None:
        # The client names every run it writes to; mlflow's module-level functions share one active run per thread.
        client = importlib.import_module("mlflow").MlflowClient(tracking_uri=self._tracking_uri)
        experiment = client.get_experiment_by_name(self._experiment)
        self._experiment_id = experiment.experiment_id if experiment else client.create_experiment(self._experiment)
        self._parent_id = client.create_run(self._experiment_id, run_name=self.sweep).info.run_id
        self._client = client


_MLFLOW_STATUS = {"complete": "FINISHED", "diverged": "FINISHED", "failed": "FAILED"}


def _is_installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers accept them: numbers, booleans and text."""
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in settings.items()
    }


def _summary(result: Any) -> dict[str, float]:
    """The numbers that sum a trial up."""
    if result is None:
        return {}
    scores = {name: float(score.value) for name, score in result.scores.items()}
    return {**scores, "train_loss": result.train_loss, "steps": result.steps, "tokens": result.tokens}
