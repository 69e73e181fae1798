"""Lets torchtune's ``tune`` command start beside a current torchao.

torchtune 0.6.1 imports two names from torchao that torchao 0.16 dropped; only torchtune's own quantizers use them. The
command fails on them before it reads its first argument, so the only place to help it is a plug-in that torch loads by
itself: an entry point of the group ``torch.backends``, called at the end of every ``import torch``.
"""

from __future__ import annotations

import sys
from pathlib import Path

_DROPPED = ("int4_weight_only", "int8_dynamic_activation_int4_weight")


def on_torch_import() -> None:
    """The entry point. It acts in the ``tune`` command alone, so that other programs pay for nothing."""
    arguments = getattr(sys, "argv", None) or [""]  # an embedding program may have none
    if Path(arguments[0]).stem == "tune":
        restore_torchao_names()


def restore_torchao_names() -> None:
    """Give torchao's quantization module the two names back, as None, where they are missing."""
    try:
        import torchao.quantization as module
    except ImportError:  # torchtune will say what is wrong, better than an error from ``import torch`` would
        return
    for name in _DROPPED:
        if not hasattr(module, name):
            setattr(module, name, None)
