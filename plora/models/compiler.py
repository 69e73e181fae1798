"""What decoder layers are compiled with: `torch.compile`'s backend with choices that suit training packed layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

from plora.kernels.ops import tag_compiled_graphs

# Elements of a row that a block of threads keeps in registers: more would spill.
_LONGEST_ROW = 4096

tag_compiled_graphs(__file__)


@functools.cache
def layer_compiler(backend: str, is_quantized: bool) -> Callable[..., Any]:
    """A backend of `torch.compile` that makes elementwise results again in backward instead of keeping them.

    The compiler does so of itself, except for those that an opaque operator reads, such as a norm's output
    that the packed products of q, k and v read: an eighth of a layer's activations.

    Of a quantized base it would see that forward and backward dequantize the same weights, do so once, and keep them
    for backward: all that quantizing has saved. So there it must not look for equal expressions.
    """
    compiler = torch._dynamo.lookup_backend(backend)

    def compile_graph(graph: Any, inputs: Any) -> Any:
        graphs = functorch_config.patch(ban_recompute_materialized_backward=False, cse=not is_quantized)
        with graphs, V.set_choices_handler(_WholeRows()):
            return compiler(graph, inputs)

    return compile_graph


class _WholeRows(InductorChoices):
    """Reads a row once, into registers, where the compiler would read it twice.

    It does so of itself with rows of up to 1024 elements. But a norm's backward reads five activations of them.
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Also for neighbouring elements up to ``_LONGEST_ROW``, where their number is known."""
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        length, along_rows = features.reduction_numel, features.get_reduction_hint() == ReductionHint.INNER
        return bool(along_rows and not cooperative_reduction and length.is_number and length <= _LONGEST_ROW)
