"""A table of all trials while they train; without a terminal, one line a minute."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from plora.report.listener import EvalRecord, Listener, RoundRecord, StepRecord
from plora.report.progress import RUNNING, WAITING, SweepProgress, TrialProgress, progress_of
from plora.report.results import settings_of, state_of, varying_settings
from plora.report.text import count, duration, score, setting_title, setting_value, settings_line

_log = logging.getLogger(__name__)

_FIXED_WIDTH = 62
_SETTING_WIDTH = 9
_CHROME_ROWS = 5
_STATE_STYLES = {RUNNING: "", "complete": "green", WAITING: "dim"}


class LiveView(Listener):
    """Shows a sweep while it runs; use it as a context manager around the training.

    On a terminal: a table that redraws itself, below whatever is logged meanwhile. Elsewhere (a file, a pipe, CI): a
    line when a trial starts or ends, and one a minute in between. Starts and ends are logged too.

    Args:
        trials: all trials of the sweep, those that wait included.
        console: where to; None for standard output.
        line_seconds: the least time between two lines where there is no terminal.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        trials: Sequence[Any] = (),
        console: Console | None = None,
        line_seconds: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._line_seconds = line_seconds
        self._clock = clock
        self._lock = threading.Lock()
        settings = [settings_of(trial) for trial in trials]
        self._varying = varying_settings(settings)
        self._progress = progress_of(trials, settings, clock())
        self._last_line = clock()
        self._live: Live | None = None
        self._log_streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> LiveView:
        self._progress.started = self._last_line = self._clock()
        if self._console.is_interactive:  # a terminal whose cursor can be moved
            self._live = Live(
                get_renderable=self.render,
                console=self._console,
                refresh_per_second=4,
                redirect_stdout=sys.stdout.isatty(),  # what goes to a file keeps going there
                redirect_stderr=sys.stderr.isatty(),
            )
            before = (sys.stdout, sys.stderr)
            self._live.start(refresh=True)
            self._log_streams = _redirect_log_handlers(before)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Draws the last state and gives the terminal back."""
        if self._live is not None:
            live, self._live = self._live, None
            for handler, stream in self._log_streams:
                handler.setStream(stream)
            self._log_streams = []
            live.stop()

    def on_start(self, trial: Any, total_steps: int) -> None:
        """See ``Listener``."""
        with self._lock:
            self._progress.start(self._row(trial), total_steps, self._clock())
        settings = settings_line(self._row(trial).settings, self._varying)
        self._tell(f"{trial.name} started: {total_steps} steps" + (f", {settings}" if settings else ""))

    def on_step(self, trial: Any, record: StepRecord) -> None:
        """See ``Listener``."""
        with self._lock:
            self._progress.add_step(self._row(trial), record, self._clock())
        if self._clock() - self._last_line >= self._line_seconds:
            self._last_line = self._clock()
            self._line(self.summary())

    def on_round(self, record: RoundRecord) -> None:
        """See ``Listener``."""
        with self._lock:
            self._progress.add_round(record)

    def on_eval(self, trial: Any | None, record: EvalRecord) -> None:
        """See ``Listener``."""
        if "val_loss" not in record.scores:
            return
        val_loss = float(record.scores["val_loss"].value)
        with self._lock:
            if trial is None:
                self._progress.base_val_loss[record.task] = val_loss
            else:
                self._progress.add_eval(self._row(trial), val_loss)

    def on_finish(self, trial: Any, result: Any, adapter: Any) -> None:
        """See ``Listener``."""
        with self._lock:
            row = self._row(trial)
            row.state = state_of(result)
        losses = f"train loss {score(row.loss)}, val loss {score(row.val_loss)}"
        self._tell(f"{trial.name} {row.state} after {row.step} steps: {losses}")

    def summary(self) -> str:
        """The whole sweep in one line."""
        now, progress = self._clock(), self._progress
        done, total = progress.steps()
        counts = progress.counts()
        order = (RUNNING, "complete", "diverged", "failed", WAITING)
        parts = [
            f"step {done}/{total}" + (f" ({100 * done // total}%)" if total else ""),
            ", ".join(f"{counts[state]} {state}" for state in order if state in counts),
            f"{count(progress.tokens_per_second())} tokens/s",
        ]
        best = progress.best()
        if best is not None:
            base = ", ".join(score(loss) for loss in progress.base_val_loss.values())
            parts.append(
                f"best val loss {score(best.best_val_loss)} ({best.name}" + (f"; base {base})" if base else ")")
            )
        parts.append(f"{duration(now - progress.started)} elapsed, ETA {duration(progress.eta(now))}")
        return " · ".join(part for part in parts if part)

    @property
    def throughput(self) -> float | None:
        """Tokens a second of the whole training so far, evaluations left out."""
        progress = self._progress
        return progress.tokens / progress.train_seconds if progress.train_seconds > 0 else None

    def render(self) -> RenderableType:
        """The table and its summary line, no larger than the terminal."""
        with self._lock:
            width, height = self._console.size
            shown = self._progress.most_relevant(height - _CHROME_ROWS)
            table = _table(shown, self._varying, width, self._progress)
            hidden = len(self._progress.trials) - len(shown)
            text = self.summary() + (f" · {hidden} more trials not shown" if hidden else "")
            return Group(table, Text(text, style="bold"))

    def _row(self, trial: Any) -> TrialProgress:
        rows = self._progress.trials
        if trial.name not in rows:  # a trial that the search proposed later
            rows[trial.name] = TrialProgress(trial.name, trial.number, settings_of(trial))
            self._varying = varying_settings(row.settings for row in rows.values())
        return rows[trial.name]

    def _tell(self, text: str) -> None:
        _log.info("%s", text)
        self._line(text)

    def _line(self, text: str) -> None:
        if self._live is None:
            line = f"{time.strftime('%H:%M:%S')}  {text}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(rows: Sequence[TrialProgress], varying: Sequence[str], width: int, progress: SweepProgress) -> Table:
    settings = varying[: max(1, (width - _FIXED_WIDTH) // _SETTING_WIDTH)]
    best = progress.best()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("trial", no_wrap=True)
    for name in settings:
        table.add_column(setting_title(name), no_wrap=True, max_width=18)
    for title in ("step", "train loss", "val loss", "tokens/s", "ETA"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        style = "bold green" if row is best else _STATE_STYLES.get(row.state, "red")
        remaining = duration(row.eta()) if row.state == RUNNING else row.state
        cells = (
            row.name,
            *(setting_value(row.settings.get(name)) for name in settings),
            f"{row.step}/{'–' if row.total is None else row.total}",
            score(row.loss),
            score(row.val_loss),
            count(row.tokens_per_second()),
            remaining,
        )
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def _redirect_log_handlers(console_streams: Sequence[Any]) -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Lets log handlers write above the table; returns each with the stream it had.

    While a ``Live`` runs, writing to ``sys.stdout`` and ``sys.stderr`` is safe, but handlers made earlier hold the
    streams themselves.
    """
    changed: list[tuple[logging.StreamHandler[Any], Any]] = []
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = {handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers}
    for handler in handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            for earlier, now in zip(console_streams, (sys.stdout, sys.stderr), strict=True):
                if handler.stream is earlier and now is not earlier:
                    changed.append((handler, earlier))
                    handler.setStream(now)
                    break
    return changed
