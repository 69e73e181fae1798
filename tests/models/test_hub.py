"""Downloads from a fake hub, and the errors that name a remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plora.models import ModelError, resolve
from tests.models.fake_hub import COMMIT, GATED, REPO, TOKEN, FakeHub, fake_hub

# huggingface_hub reads its environment at import, so every setting needs a process of its own.
_SCRIPT = """
import json, sys, time
time.sleep = lambda seconds: None  # huggingface_hub retries with pauses
from plora.models.hub import resolve
answers = []
for repo, revision, weights in json.loads(sys.argv[1]):
    try:
        checkpoint = resolve(repo, revision, weights=weights)
        files = sorted(file.name for file in checkpoint.folder.iterdir())
        answers.append({"commit": checkpoint.commit, "folder": str(checkpoint.folder), "files": files})
    except ValueError as error:
        answers.append({"error": str(error)})
print(json.dumps(answers))
"""
_UNSET = (
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_TOKEN_PATH",
    "HUGGING_FACE_HUB_TOKEN",
)


def _resolve(cases: list[tuple[str, str, bool]], home: Path, endpoint: str, **settings: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key not in _UNSET}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "*", "no_proxy": "*", **settings}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(cases)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with fake_hub(folder) as served:
        yield served


def test_downloads_and_names_what_it_cannot_have(hub: FakeHub, tmp_path: Path) -> None:
    small, whole, missing, revision, gated = _resolve(
        [
            (REPO, "main", False),
            (REPO, "main", True),
            ("someone/nothing", "main", True),
            (REPO, "v9", True),
            (GATED, "main", True),
        ],
        tmp_path,
        hub.url,
    )
    assert small["files"] == ["config.json", "tokenizer.json"]
    assert whole["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert small["commit"] == whole["commit"] == COMMIT
    assert Path(whole["folder"]).is_relative_to(tmp_path)
    assert "has no model 'someone/nothing'" in missing["error"]
    assert "HF_TOKEN" in missing["error"]
    assert "no revision 'v9'" in revision["error"]
    assert f"accept its terms at {hub.url}/{GATED}" in gated["error"]
    assert "HF_TOKEN" in gated["error"]
    assert not any("bin" in request for request in hub.requests)


def test_a_token_opens_a_gated_model_and_offline_uses_the_cache(hub: FakeHub, tmp_path: Path) -> None:
    (allowed,) = _resolve([(GATED, "main", True)], tmp_path, hub.url, HF_TOKEN=TOKEN)
    assert allowed["commit"] == COMMIT
    asked = len(hub.requests)
    cached, absent = _resolve([(GATED, "main", True), (REPO, "main", True)], tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert cached == allowed
    assert "HF_HUB_OFFLINE is set" in absent["error"]
    assert str(tmp_path) in absent["error"]
    assert len(hub.requests) == asked


def test_an_unreachable_hub_is_named(tmp_path: Path) -> None:
    (answer,) = _resolve([(REPO, "main", True)], tmp_path, "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in answer["error"]


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "~/no-such-model", "models/of/mine"])
def test_a_missing_folder_is_no_hub_id(source: str) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        resolve(source)


def test_a_malformed_id() -> None:
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        resolve("some one/tiny")


def test_a_folder_is_itself(tmp_path: Path) -> None:
    checkpoint = resolve(tmp_path)
    assert (checkpoint.folder, checkpoint.commit) == (tmp_path.resolve(), None)
