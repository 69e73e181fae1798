from __future__ import annotations

from pathlib import Path

import pytest

from plora.config import shipped


def test_copy_writes_the_text_and_overwrites_nothing(tmp_path: Path) -> None:
    target = shipped.copy("plora/quickstart", tmp_path / "new" / "my.yaml")
    assert target.read_text() == shipped.text_of("plora/quickstart")
    target.write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        shipped.copy("plora/quickstart", target)
    assert target.read_text() == "mine"


def test_copy_into_a_folder_keeps_the_name(tmp_path: Path) -> None:
    assert shipped.copy("quickstart", tmp_path) == tmp_path / "quickstart.yaml"


def test_copy_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"):
        shipped.copy("quickstart", tmp_path / "file" / "my.yaml")


def test_purposes_are_a_sentence() -> None:
    for name in shipped.names():
        assert shipped.purpose_of(name).endswith(".")
