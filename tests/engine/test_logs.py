from __future__ import annotations

import logging
from pathlib import Path

import pytest

from plora.engine.logs import SweepLog

LOGGER = logging.getLogger("plora")


def test_the_file_has_what_was_said_before_there_was_one(tmp_path: Path) -> None:
    before = LOGGER.level
    log = SweepLog()
    log.open("INFO")
    logging.getLogger("plora.data").warning("a base model with a chat template")
    log.write_to(tmp_path / "run" / "log.txt")
    logging.getLogger("plora.engine").info("1 trial")
    logging.getLogger("plora.engine").debug("a detail")
    log.close()
    logging.getLogger("plora.engine").warning("too late")
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "WARNING plora.data: a base model with a chat template",
        "INFO plora.engine: 1 trial",
    ]
    assert (LOGGER.handlers, LOGGER.level) == ([], before)


@pytest.mark.parametrize("configured", [True, False])
def test_the_terminal_is_used_where_the_application_has_no_logging(
    configured: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()] if configured else [])
    log = SweepLog()
    log.open("INFO")
    LOGGER.info("2 packs")
    logging.getLogger("plora.report.live").info("t001 started: 4 steps")
    log.close()
    assert capsys.readouterr().err == ("" if configured else "2 packs\n")
