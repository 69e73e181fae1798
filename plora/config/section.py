"""Reading one mapping of the configuration, key by key, noting every mistake instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from plora.config.checks import Check
from plora.config.mistakes import NO_VALUE, Findings, unknown_key


class Section:
    """A mapping under ``path`` whose keys are read one at a time.

    Args:
        raw: the mapping; anything else is noted as a mistake and read as empty.
        path: where it stands in the configuration; empty for the whole.
        known: the keys it may have; others are noted. None accepts any.
        findings: collects what is wrong.
    """

    def __init__(self, raw: Any, path: str, known: Iterable[str] | None, findings: Findings) -> None:
        self.path = path
        self.findings = findings
        self.raw: dict[str, Any] = {}
        if isinstance(raw, Mapping):
            self.raw = {str(key): value for key, value in raw.items()}
        elif raw is not None:
            findings.add(path, "must be a mapping, i.e. lines of `key: value`", raw)
        if known is not None:
            known = tuple(known)
            for key in self.raw:
                if key not in known:
                    findings.add(self.at(key), unknown_key(key, known))

    def at(self, key: str) -> str:
        """The path of ``key``."""
        return f"{self.path}.{key}" if self.path else key

    def read(self, key: str, check: Check, default: Any = NO_VALUE) -> Any:
        """The checked value of ``key``, or ``default`` where it is absent or wrong. Without one the key is required."""
        if key not in self.raw:
            if default is not NO_VALUE:
                return default
            if self.at(key) not in self.findings.unreadable:
                self.findings.add(self.at(key), "is missing")
            return None
        try:
            return check(self.raw[key])
        except ValueError as error:
            self.findings.add(self.at(key), str(error), self.raw[key])
            return None if default is NO_VALUE else default

    def section(self, key: str, known: Iterable[str] | None) -> Section:
        """The mapping under ``key``; empty where it is absent or null."""
        return Section(self.raw.get(key), self.at(key), known, self.findings)

    def __contains__(self, key: str) -> bool:
        return self.raw.get(key) is not None
