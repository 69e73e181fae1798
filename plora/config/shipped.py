"""The configurations that come with plora, as ``plora/<name>``. Loads nothing heavy, for the command line's sake."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

PREFIX = "plora/"


def names() -> list[str]:
    """Names of the shipped configurations, each as it is given to ``--config``."""
    files = resources.files("plora.configs").iterdir()
    return sorted(PREFIX + file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def text_of(name: str) -> str:
    """The YAML text of the shipped configuration ``name``, with or without ``plora/``.

    Raises:
        ValueError: if there is none of that name.
    """
    full = name if name.startswith(PREFIX) else PREFIX + name
    if full not in names():
        close = difflib.get_close_matches(full, names(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names())}"
        raise ValueError(f"there is no shipped configuration {name!r}; {hint}")
    file = resources.files("plora.configs").joinpath(full.removeprefix(PREFIX) + ".yaml")
    return file.read_text(encoding="utf-8")


def purpose_of(name: str) -> str:
    """The first line of ``name``'s opening comment: what it does."""
    return text_of(name).partition("\n")[0].lstrip("# ").strip()


def copy(name: str, destination: str | Path) -> Path:
    """Write the shipped configuration ``name`` to a new file, or under its own name into a folder.

    Raises:
        ValueError: if there is no such configuration, or the file exists, or it cannot be written.
    """
    text = text_of(name)
    target = Path(destination)
    if target.is_dir():
        target = target / (name.removeprefix(PREFIX) + ".yaml")
    if target.exists():
        raise ValueError(f"{target} already exists: choose another name, or remove it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror}") from error
    return target
