"""The command line: ``plora run``, ``plora ls``, ``plora cp``. Heavy imports happen only where they are needed."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Protocol

from plora.config import shipped
from plora.config.mistakes import ConfigError

if TYPE_CHECKING:
    from plora.config.schema import SweepConfig

logger = logging.getLogger(__name__)

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Recipe(Protocol):
    """The steps of a recipe, in order."""

    def setup(self) -> None:
        """Check and load."""

    def plan(self) -> bool:
        """Decide what runs where; False where nothing is to follow."""

    def run(self) -> None:
        """Train."""

    def report(self) -> None:
        """Write the results."""

    def cleanup(self) -> None:
        """Let go of everything, after success or failure."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 2 for a user's mistake."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "run":
        return int(importlib.import_module("plora_sweep").main(rest, prog="plora run"))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _list() if options.command == "ls" else _copy(options.name, options.destination)
    except ValueError as error:
        return _complain(error)


def run_recipe(make: Callable[[SweepConfig], Recipe], arguments: Sequence[str] | None = None, prog: str = "") -> int:
    """Take a recipe through its steps with the configuration that ``arguments`` name.

    Args:
        make: from a configuration to the recipe.
        arguments: ``--config X [key=value ...]``; the process's own if None.
        prog: how the user started this, for the usage message.

    Returns:
        The exit status. Mistakes of the user's, and a disk that fills up, are written to stderr without a traceback.
    """
    options = _run_parser(prog).parse_intermixed_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _complain("plora trains on one device: leave out --nproc_per_node and other torchrun options")
    from plora.checkpoint.disk import DiskFullError

    # A metric or a data set of the user's own lies beside the YAML they start from here.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        from plora.config.loading import load

        recipe = make(load(options.config, options.overrides))
        try:
            return _take_steps(recipe)
        finally:
            recipe.cleanup()
    except (ConfigError, DiskFullError) as error:
        return _complain(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def _take_steps(recipe: Recipe) -> int:
    try:
        recipe.setup()
        goes_on = recipe.plan()
    # Before training, these are about the model, the data, the device or the disk asked for.
    except (ValueError, OSError) as error:
        logger.debug("setup failed", exc_info=True)
        return _complain(error)
    if goes_on:
        recipe.run()
        recipe.report()
    return 0


def _list() -> int:
    shown = shipped.names()
    width = max(map(len, shown))
    for name in shown:
        print(f"{name:<{width}}  {shipped.purpose_of(name)}")
    return 0


def _copy(name: str, destination: str) -> int:
    print(f"wrote {shipped.copy(name, destination)}")
    return 0


def _complain(error: object) -> int:
    print(f"plora: {error}", file=sys.stderr)
    return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="plora", description="Train many LoRA configurations at once.")
    parser.add_argument("--version", action="version", version=f"plora {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("run", help="run a sweep: --config FILE [key=value ...]", add_help=False)
    commands.add_parser("ls", help="list the shipped configurations")
    copy = commands.add_parser("cp", help="copy a shipped configuration, to change it")
    copy.add_argument("name", help="as `plora ls` shows it")
    copy.add_argument("destination", help="a new file, or a folder")
    return parser


def _run_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog or None, description="Run a sweep of LoRA configurations.", allow_abbrev=False
    )
    parser.add_argument(
        "--config", required=True, help="a YAML file, or a shipped configuration such as plora/quickstart"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change the configuration: trial.lr=1e-4, or ~key to remove"
    )
    return parser


def _version() -> str:
    try:
        return metadata.version("plora")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
