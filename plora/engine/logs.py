"""Where the log goes while a sweep runs: the terminal, and ``log.txt``."""

from __future__ import annotations

import logging
from logging.handlers import BufferingHandler
from pathlib import Path

from plora.report import live

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class SweepLog:
    """Handlers on plora's logger, from ``open`` to ``close``.

    An application that has set up logging of its own keeps it: then only the file is added.
    """

    def __init__(self) -> None:
        self._logger = logging.getLogger("plora")
        self._handlers: list[logging.Handler] = []
        self._early = BufferingHandler(capacity=10_000)
        self._level = self._logger.level

    def open(self, level: str) -> None:
        """Log to the terminal, and keep what is said until there is a file."""
        if not self._logger.hasHandlers():
            terminal = logging.StreamHandler()
            terminal.setFormatter(logging.Formatter("%(message)s"))
            terminal.addFilter(lambda record: record.name != live.__name__)  # the view shows it there itself
            self._add(terminal)
        self._add(self._early)
        self._logger.setLevel(level)

    def write_to(self, path: Path) -> None:
        """Log to ``path`` too, whose folder is made, with all that was said since ``open``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter(_FORMAT))
        for record in self._early.buffer:
            file.handle(record)
        self._logger.removeHandler(self._early)
        self._add(file)

    def close(self) -> None:
        """Put plora's logger back as it was."""
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()
        self._logger.setLevel(self._level)
        self._handlers = []

    def _add(self, handler: logging.Handler) -> None:
        self._handlers.append(handler)
        self._logger.addHandler(handler)
