"""A full disk is told from other failures."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import namedtuple

import pytest

from plora.checkpoint.disk import DiskFullError, full_disk_explained


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_folder_room_and_what_is_kept_are_named(code, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100 << 20, 97 << 20, 3 << 20))
    expected = f"output_dir = '{tmp_path}': {os.strerror(code)} (3 MiB free): make room; 2 trials had completed"
    explained = full_disk_explained(tmp_path, lambda: "2 trials had completed")
    with pytest.raises(DiskFullError, match=f"^{re.escape(expected)}$"), explained:
        raise OSError(code, os.strerror(code))


def test_other_failures_pass_as_they_are(tmp_path):
    error = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(PermissionError) as caught, full_disk_explained(tmp_path, str):
        raise error
    assert caught.value is error
