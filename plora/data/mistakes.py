"""Wording of a user's mistakes in the data sections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any


def nearest(value: object, known: Iterable[str]) -> str:
    """A hint for ``value``, which is not in ``known``: the closest of them, and all."""
    names = [str(k) for k in known]
    close = get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}There are: {', '.join(names) or 'none'}"


def unknown_keys(section: Mapping[str, Any], known: Iterable[str], where: str) -> list[str]:
    """A mistake for each key of ``section`` that is not in ``known``."""
    names = sorted(known)
    return [f"{where}.{key}: unknown key; {nearest(key, names)}" for key in section if key not in names]
