"""Lets torchtune work beside a current torchao.

torchtune 0.6.1 imports two names from torchao that torchao 0.16 dropped; only torchtune's own quantizers use them. Its
``tune`` command fails on them before it reads its first argument, so the only place to help it is a plug-in that torch
loads by itself: an entry point of the group ``torch.backends``, called at the end of every ``import torch``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DROPPED = ("int4_weight_only", "int8_dynamic_activation_int4_weight")
# torchao warns of each of its own kernels that this torch cannot load; NF4 uses none of them.
_NOISY = ("torchao", "torch.utils._pytree")


def on_torch_import() -> None:
    """The entry point. It acts in the ``tune`` command alone, so that other programs pay for nothing."""
    arguments = getattr(sys, "argv", None) or [""]  # an embedding program may have none
    if Path(arguments[0]).stem == "tune":
        # torchao may be in the middle of its own import, and warns after this returns.
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            restore_torchao_names()
        except ImportError:  # torchtune will say what is wrong, better than an error from ``import torch`` would
            return


def restore_torchao_names() -> None:
    """Give torchao's quantization module the two names back, as None, where they are missing.

    Raises:
        ImportError: if torchao is not installed.
    """
    with _quiet(*_NOISY):
        import torchao.quantization as module
    for name in _DROPPED:
        if not hasattr(module, name):
            setattr(module, name, None)


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Hold back warnings that users can do nothing about."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
