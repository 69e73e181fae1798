"""Files of one JSON object a line, appended to while a sweep runs and readable at any moment."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends records to a file, each flushed at once so that nothing is lost when the process dies.

    The file is opened by the first record. Safe to call from several threads.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: Any = None
        self._lock = threading.Lock()

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line. Numbers that JSON lacks (NaN, infinities) are written as null."""
        line = json.dumps(jsonable(record), allow_nan=False, ensure_ascii=False)
        with self._lock:
            if self._file is None:
                self._file = _open_at_line_start(self.path)
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file; a later ``append`` opens it again."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records of a file, oldest first; lines that a killed process left unfinished are passed over.

    A file that does not exist holds no records.
    """
    path = Path(path)
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record


def jsonable(value: Any) -> Any:
    """``value`` in JSON's own types: non-finite numbers become None, arrays lists, what JSON has no type for text."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if callable(getattr(value, "tolist", None)):  # numpy and torch, without importing either
        return jsonable(value.tolist())
    return str(value)


def _open_at_line_start(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # the line that a killed process was writing
                file.write(b"\n")
    return open(path, "a", encoding="utf-8")
