"""Checks of single values: each takes what the user wrote, returns the value to use, or says what is accepted."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], Any]
_LARGEST = 1.7e308  # also keeps out infinity, NaN and whole numbers that no float can hold


def whole(low: int | None = None, high: int | None = None) -> Check:
    """A whole number in [low, high]."""
    accepted = "must be a whole number" + _limits(low=low, high=high)

    def check(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(accepted)
        if (low is not None and value < low) or (high is not None and value > high):
            raise ValueError(accepted)
        return value

    return check


def real(
    *, low: float | None = None, above: float | None = None, high: float | None = None, below: float | None = None
) -> Check:
    """A finite number, at least ``low`` or greater than ``above``, at most ``high`` or less than ``below``."""
    accepted = "must be a number" + _limits(low=low, above=above, high=high, below=below)

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(accepted + (", not text" if isinstance(value, str) else ""))
        if not abs(value) <= _LARGEST:
            raise ValueError(accepted)
        inside = (
            (low is None or value >= low)
            and (above is None or value > above)
            and (high is None or value <= high)
            and (below is None or value < below)
        )
        if not inside:
            raise ValueError(accepted)
        return float(value)

    return check


def _limits(
    *, low: float | None = None, above: float | None = None, high: float | None = None, below: float | None = None
) -> str:
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    parts = []
    if low is not None:
        parts.append(f"at least {low:g}")
    if above is not None:
        parts.append(f"greater than {above:g}")
    if high is not None:
        parts.append(f"at most {high:g}")
    if below is not None:
        parts.append(f"less than {below:g}")
    return " " + " and ".join(parts) if parts else ""


def one_of(*choices: str) -> Check:
    """One of a few words."""

    def check(value: Any) -> str:
        if value in choices:
            return value
        by_case = {choice.lower(): choice for choice in choices}
        close = [by_case[word] for word in difflib.get_close_matches(str(value).lower(), by_case, n=1)]
        raise ValueError(f"must be one of {', '.join(choices)}" + (f"; did you mean {close[0]!r}?" if close else ""))

    return check


def text(value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be text")
    return value


def boolean(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def mapping(value: Any) -> dict[str, Any]:
    """Keys with values."""
    if not isinstance(value, Mapping):
        raise ValueError("must be a mapping, i.e. lines of `key: value`")
    return dict(value)


def optional(check: Check) -> Check:
    """What ``check`` accepts, or null."""

    def check_optional(value: Any) -> Any:
        if value is None:
            return None
        try:
            return check(value)
        except ValueError as error:
            raise ValueError(f"{error}, or null") from None

    return check_optional


def word_or(word: str, check: Check) -> Check:
    """``word``, or what ``check`` accepts."""

    def check_either(value: Any) -> Any:
        if value == word:
            return value
        try:
            return check(value)
        except ValueError as error:
            raise ValueError(f"{error}, or {word!r}") from None

    return check_either


def dotted_name(value: Any) -> str:
    """The dotted name of something importable: ``package.module.name``."""
    if not is_dotted_name(value):
        raise ValueError("must be a dotted name such as my_package.my_module.my_function")
    return value


def is_dotted_name(value: Any) -> bool:
    """Whether ``value`` reads as ``package.name``."""
    parts = value.split(".") if isinstance(value, str) else []
    return len(parts) > 1 and all(part.isidentifier() for part in parts)
