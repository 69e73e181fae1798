"""Files and directories appear whole or not at all."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from plora.checkpoint.atomic import atomic_directory, atomic_file, write_text


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    target = tmp_path / "new" / "file.txt"
    write_text(target, "first")

    def fail():
        with atomic_file(target) as partial:
            partial.write_text("half of the sec")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "first"
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_who_reads_the_earlier_file_is_not_disturbed(tmp_path):
    target = tmp_path / "file.txt"
    write_text(target, "first")
    with open(target) as reader:
        write_text(target, "second")
        assert reader.read() == "first"
    assert target.read_text() == "second"


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "adapter"

    def fail():
        with atomic_directory(target) as partial:
            (partial / "a").write_text("1")
            assert not target.exists()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_replaces_the_earlier_one_and_leftovers(tmp_path):
    target = tmp_path / "adapter"
    for content in ("old", "new"):
        (tmp_path / ".adapter.partial").mkdir()
        (tmp_path / ".adapter.partial" / "of_a_killed_process").write_text("x")
        with atomic_directory(target) as partial:
            (partial / content).write_text(content)
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("write", [atomic_file, atomic_directory])
@pytest.mark.parametrize("kind", [Exception, SafetensorError])
def test_what_the_system_refuses_is_an_os_error(tmp_path, write, kind):
    with pytest.raises(OSError, match="No space left") as caught, write(tmp_path / "adapter"):
        raise kind("Error while serializing: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(kind, match="too large"), write(tmp_path / "adapter"):
        raise kind("a header that is too large")
    assert not list(tmp_path.iterdir())
