"""A user's mistakes, collected so that they can be shown all at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

NO_VALUE: Any = object()
_LONGEST_VALUE = 80


@dataclass(frozen=True)
class Mistake:
    """One thing to correct.

    Args:
        path: where it is, in dots: ``"trial.rank"``.
        advice: what is wrong and what to do, a clause without a full stop.
        value: what was found there; ``NO_VALUE`` if nothing was.
    """

    path: str
    advice: str
    value: Any = NO_VALUE

    def __str__(self) -> str:
        if self.value is NO_VALUE:
            return f"{self.path}: {self.advice}" if self.path else self.advice
        shown = repr(self.value)
        if len(shown) > _LONGEST_VALUE:
            shown = shown[:_LONGEST_VALUE] + "..."
        return f"{self.path} = {shown}: {self.advice}"


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, as a numbered list.

    Args:
        mistakes: what to correct; plain text for what has no place in the file.
        source: the file or object they were found in, for the heading.
    """

    def __init__(self, mistakes: Sequence[Mistake | str], source: str = "the configuration") -> None:
        self.mistakes = tuple(Mistake("", item) if isinstance(item, str) else item for item in mistakes)
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        lines = [f"{count} in {source}:"]
        lines += [f"  {index}. {mistake}" for index, mistake in enumerate(mistakes, start=1)]
        super().__init__("\n".join(lines))


@dataclass
class Findings:
    """What reading a configuration brought up: mistakes stop the sweep, warnings do not.

    Args:
        mistakes: what must be corrected.
        warnings: what has no effect, or not the one it seems to have.
        unreadable: paths whose value could not be worked out; already noted, so not missing.
    """

    mistakes: list[Mistake] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)

    def add(self, path: str, advice: str, value: Any = NO_VALUE) -> None:
        """Note a mistake."""
        self.mistakes.append(Mistake(path, advice, value))

    def warn(self, path: str, text: str) -> None:
        """Note a setting that is legal but has no effect, or not the one it seems to have."""
        self.warnings.append(f"{path}: {text}")

    def raise_if_any(self, source: str) -> None:
        """Raise a ``ConfigError`` if mistakes were noted."""
        if self.mistakes:
            raise ConfigError(self.mistakes, source)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The advice for ``key``, which is not one of ``known``."""
    if ":" in key:
        return "unknown key; in a value like {rank: 4} write a space after the colon"
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if close:
        return f"unknown key; did you mean {close[0]!r}?"
    return f"unknown key; known here: {', '.join(names) or 'none'}"
