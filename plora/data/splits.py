"""Split strings such as ``train[:-500]``, ``train[10%:20%]`` or ``train+validation``."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = re.compile(r"^(?P<name>[^\[\]+:%\s]+)(\[(?P<from>-?\d+%?)?:(?P<to>-?\d+%?)?\])?$")


@dataclass(frozen=True)
class SplitPart:
    """A run of one split's rows.

    Args:
        name: the split.
        start: first row, ``"100"``, ``"-100"`` (from the end) or ``"10%"``; None for the start.
        stop: one past the last row; None for the end.
    """

    name: str
    start: str | None = None
    stop: str | None = None

    def rows(self, n: int) -> range:
        """The rows of a split of ``n`` that this part takes."""
        return range(n)[_bound(self.start, n) : _bound(self.stop, n)]


def parse_split(text: str) -> list[SplitPart]:
    """The parts of a split string, joined by ``+``.

    Raises:
        ValueError: if it cannot be read.
    """
    parts = []
    for piece in str(text).split("+"):
        found = _PART.match(piece.strip())
        if found is None:
            raise ValueError(
                f"{text!r} is not a split: write a name, with rows or percentages in brackets if need be, "
                "such as train, train[:-500], train[10%:20%] or train+validation"
            )
        parts.append(SplitPart(found["name"], found["from"], found["to"]))
    return parts


def _bound(text: str | None, n: int) -> int | None:
    if text is None:
        return None
    return round(int(text[:-1]) * n / 100) if text.endswith("%") else int(text)
