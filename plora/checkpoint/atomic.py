"""Files and directories that are either complete or absent, whenever the process is killed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; what was written there takes its place at the end.

    A block that raises leaves an earlier ``path`` as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _system_errors():
            yield partial
        _flush_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a fresh temporary directory beside ``path`` that is renamed to ``path`` at the end.

    An earlier ``path`` is replaced. The temporary name is fixed, so what a killed process left
    behind is removed by the next attempt.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, earlier = (path.with_name(f".{path.name}.{suffix}") for suffix in ("partial", "earlier"))
    for leftover in (partial, earlier):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        with _system_errors():
            yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush_to_disk(file)
        if path.exists():  # a non-empty directory cannot be replaced by one rename
            os.rename(path, earlier)
        os.rename(partial, path)
    finally:
        for leftover in (partial, earlier):
            shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raises as ``OSError`` what the system refuses safetensors and tokenizers, who tell of it in text alone."""
    try:
        yield
    except Exception as error:  # the very class that tokenizers raises
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _flush_to_disk(path: Path) -> None:
    """A rename may reach the disk before the data it names, unless the data is synced first."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
