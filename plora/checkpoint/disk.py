"""A disk that fills up while a sweep writes to it."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from plora.profiler.memory import format_bytes


class DiskFullError(OSError):
    """The disk, or the user's share of it, is full; the message says what to do."""


@contextmanager
def full_disk_explained(output_dir: Path, kept: Callable[[], str]) -> Iterator[None]:
    """Raises a ``DiskFullError`` where the block runs out of disk; any other error passes as it is.

    Args:
        output_dir: where the block writes.
        kept: says what is left of the work, a clause without a full stop.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = format_bytes(shutil.disk_usage(output_dir).free)
        raise DiskFullError(
            f"output_dir = '{output_dir}': {error.strerror} ({free} free): make room; {kept()}"
        ) from error
