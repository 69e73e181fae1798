"""Where the log goes while a sweep runs: the terminal, and ``log.txt``."""

from __future__ import annotations

import logging
from pathlib import Path

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class SweepLog:
    """Handlers on plora's logger, from ``open`` to ``close``.

    An application that has set up logging of its own keeps it: then only the file is added.
    """

    def __init__(self) -> None:
        self._logger = logging.getLogger("plora")
        self._handlers: list[logging.Handler] = []
        self._level = self._logger.level

    def open(self, path: Path, level: str) -> None:
        """Log to ``path``, whose folder is made, and to the terminal."""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter(_FORMAT))
        self._handlers = [file]
        if not self._logger.hasHandlers():
            terminal = logging.StreamHandler()
            terminal.setFormatter(logging.Formatter("%(message)s"))
            self._handlers.append(terminal)
        for handler in self._handlers:
            self._logger.addHandler(handler)
        self._logger.setLevel(level)

    def close(self) -> None:
        """Put plora's logger back as it was."""
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()
        self._logger.setLevel(self._level)
        self._handlers = []
