"""Overrides: ``a.b=value`` sets, ``~a.b`` removes, as torchtune and OmegaConf write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plora.config.mistakes import Findings


def apply_overrides(tree: DictConfig, overrides: Sequence[str] | Mapping[str, Any], findings: Findings) -> None:
    """Change ``tree`` as ``overrides`` say; those that cannot be applied are noted.

    Args:
        tree: the configuration.
        overrides: ``["trial.lr=1e-4", "~dataset_test"]``, or a mapping whose keys may have dots.
        findings: collects what is wrong.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _set(tree, str(key), value, findings)
        return
    for text in overrides:
        if text.startswith("~"):
            _remove(tree, text[1:], findings)
        elif "=" not in text or text.startswith("-"):
            findings.add("command line", "is not an override: write key=value to set, ~key to remove", text)
        else:
            key, _, value = text.partition("=")
            try:
                parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
                assert isinstance(parsed, dict)
                _set(tree, key, parsed["value"], findings)
            except (yaml.YAMLError, OmegaConfBaseException):
                findings.add("command line", "the value is not valid YAML: put it in quotes", text)


def _set(tree: DictConfig, key: str, value: Any, findings: Findings) -> None:
    parts = key.split(".")
    if not all(parts):
        findings.add("command line", "is not a key: write names with single dots between them", key)
        return
    try:
        for depth in range(1, len(parts)):
            parent = ".".join(parts[:depth])
            if isinstance(OmegaConf.select(tree, parent), ListConfig):
                findings.add(parent, f"is a list, which can only be replaced as a whole, not by {key}=")
                return
        OmegaConf.update(tree, key, value, merge=True, force_add=True)
    except OmegaConfBaseException as error:
        findings.add(key, f"cannot be set: {str(error).splitlines()[0]}", value)


def _remove(tree: DictConfig, key: str, findings: Findings) -> None:
    parent_key, _, leaf = key.rpartition(".")
    try:
        parent = OmegaConf.select(tree, parent_key) if parent_key else tree
    except OmegaConfBaseException:
        parent = None
    if not isinstance(parent, DictConfig) or leaf not in parent:
        names = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
        findings.add(
            "command line", f"there is no such key to remove; there are {', '.join(names) or 'none'}", f"~{key}"
        )
        return
    del parent[leaf]
