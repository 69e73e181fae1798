"""The order in which a trial sees its examples, as a pure function of its step."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=256)
def _epoch_order(n_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng((seed, epoch)).permutation(n_examples).tolist())


class ExampleStream:
    """Batches of example indices: every epoch is a fresh shuffle, its last batch may be smaller.

    ``batch(step)`` depends on nothing but the arguments and the step, so a trial that is resumed,
    parked or moved to another pack goes on with exactly the examples it would have seen.

    Args:
        n_examples: size of the training set.
        batch_size: examples per optimizer step; one that exceeds ``n_examples`` takes all of them.
        seed: the trial's seed, zero or above.

    Raises:
        ValueError: if ``n_examples`` or ``batch_size`` is below one or ``seed`` is negative.
    """

    def __init__(self, n_examples: int, batch_size: int, seed: int) -> None:
        if n_examples < 1:
            raise ValueError(f"a training set needs at least one example, got {n_examples}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be zero or above, got {seed}")
        self.n_examples = n_examples
        self.batch_size = batch_size
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the examples."""
        return -(-self.n_examples // self.batch_size)

    def batch(self, step: int) -> list[int]:
        """The examples of optimizer step ``step`` (from zero), in order."""
        assert step >= 0
        epoch, index = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.n_examples, self.seed, epoch)
        return list(order[index * self.batch_size : (index + 1) * self.batch_size])
