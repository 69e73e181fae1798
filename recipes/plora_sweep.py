"""A sweep of LoRA configurations over one frozen base model.

tune run plora_sweep --config plora/quickstart [key=value ...]
plora run --config ./my.yaml [key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from plora.cli import run_recipe

if TYPE_CHECKING:
    from plora.config import SweepConfig


class SweepRecipe:
    """The steps of a sweep, in order.

    Args:
        config: the checked configuration.
    """

    def __init__(self, config: SweepConfig) -> None:
        from plora.engine import Sweep  # here, so that --help and mistakes in the YAML wait for no torch

        self._sweep = Sweep(config)

    def setup(self) -> None:
        """Check everything against the model, the data and the disk; then load them."""
        self._sweep.setup()

    def plan(self) -> bool:
        """Decide which trials train together; False where only the plan was asked for."""
        return self._sweep.plan()

    def run(self) -> None:
        """Train and score every trial."""
        self._sweep.run()

    def report(self) -> None:
        """Rank the trials, score the winner once on the test data, and write the results."""
        self._sweep.report()

    def cleanup(self) -> None:
        """Close files and trackers, whatever happened."""
        self._sweep.cleanup()


def main(arguments: Sequence[str] | None = None, prog: str = "tune run plora_sweep") -> int:
    """Run the recipe and return its exit status."""
    return run_recipe(SweepRecipe, arguments, prog)


if __name__ == "__main__":
    sys.exit(main())
