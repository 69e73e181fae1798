"""Data sets of the Hugging Face hub."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from plora.data.mistakes import nearest

if TYPE_CHECKING:
    import datasets

_TIMEOUT_SECONDS = 3.0


def unreachable() -> str | None:
    """Why the hub cannot be asked, with the remedy; None if it can, or if the cache is to be used.

    The hub's own client retries for half a minute before it says so.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return None
    endpoint = urlsplit(constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=_TIMEOUT_SECONDS):
            return None
    except OSError as error:
        return (
            f"the hub at {constants.ENDPOINT} cannot be reached ({error}): use a local folder or file, or set "
            "HF_HUB_OFFLINE=1 if it was downloaded before"
        )


def load_split(section: Mapping[str, Any], split: str) -> datasets.Dataset:
    """One whole split of a hub data set.

    Raises:
        ValueError: if the data set, its configuration or the split does not exist or the hub cannot be reached.
    """
    import datasets

    return _ask(section, split, lambda arguments: datasets.load_dataset(**arguments, split=split))


def describe(section: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the splits and columns without downloading the data; empty where the hub does not say."""
    import datasets

    info = _ask(section, None, lambda arguments: datasets.load_dataset_builder(**arguments).info)
    return list(info.splits or ()), list(info.features or ())


def _ask(section: Mapping[str, Any], split: str | None, call: Any) -> Any:
    """Calls the datasets library and words its errors for a user."""
    source = section["source"]
    keys = {"source": "path", "name": "name", "revision": "revision", "data_files": "data_files"}
    arguments = {ours: section[key] for key, ours in keys.items() if section.get(key) is not None}
    reason = unreachable()
    if reason is not None:
        raise ValueError(f"the data set {source!r} is not a local file and {reason}")
    try:
        return call(arguments)
    except OSError as error:
        raise ValueError(
            f"the data set {source!r} cannot be had from the hub: {_first_line(error)}. Check its id (owner/name), "
            "set HF_TOKEN if it is gated, or use a local file; without a network it must have been downloaded before"
        ) from error
    except (ValueError, KeyError, RuntimeError) as error:
        about = f", split {split!r}" if split else ""
        raise ValueError(f"the data set {source!r}{about}: {_first_line(error)}") from error


def split_mistake(split: str, splits: list[str]) -> str:
    """The advice for a split that does not exist."""
    return f"there is no split {split!r}; {nearest(split, splits)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
