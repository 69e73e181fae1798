"""A token budget that shrinks where the device runs out of memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class TokenBudget:
    """Most tokens to compute on at a time. It halves, for good, each time they do not fit.

    Args:
        tokens: the budget to begin with.
        purpose: what it is for, for the log.
        relief: frees memory that can be done without, and says whether there was any; tried before halving.
    """

    def __init__(self, tokens: int, purpose: str, relief: Callable[[], bool] | None = None) -> None:
        if tokens < 1:
            raise ValueError(f"the token budget of {purpose} must be at least 1, got {tokens}")
        self.tokens = tokens
        self.purpose = purpose
        self._relief = relief

    def run(self, attempt: Callable[[int], Result], smallest: int) -> Result:
        """``attempt(tokens)``, again with half the tokens whenever memory runs out.

        Args:
            attempt: may be called again from the start after it ran out of memory.
            smallest: the longest sequence, in tokens. Nothing is gained below it, because sequences are not split.

        Raises:
            torch.OutOfMemoryError: if even the longest sequence alone does not fit.
        """
        while True:
            try:
                return attempt(self.tokens)
            except torch.OutOfMemoryError:
                relieved = self._relief is not None and self._relief()
                if self.tokens <= smallest and not relieved:
                    raise
            # Here and not in the handler: there the traceback keeps the failed attempt's tensors alive.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if relieved:
                continue
            before, self.tokens = self.tokens, max(smallest, self.tokens // 2)
            log.warning(
                "out of memory during %s with %d tokens at a time: going on with %d", self.purpose, before, self.tokens
            )
