"""Which layers of a model can carry an adapter, and what their names mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from plora.modules.config import ALL_LINEAR, AdapterConfig
from plora.modules.names import HEADS, TORCHTUNE, problem_with

_SHARED_INPUT = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
_ROW_PARALLEL = frozenset({"o_proj", "down_proj"})


@dataclass(frozen=True)
class Target:
    """A linear layer that adapters can be added to.

    Args:
        path: the layer's name in ``model.named_modules()``.
        name: its last component in Hugging Face's words, e.g. ``"q_proj"``.
        in_features: D.
        out_features: N.
        input_group: layers of equal group read the same input and share a dropout mask.
    """

    path: str
    name: str
    in_features: int
    out_features: int
    input_group: str

    @property
    def row_parallel(self) -> bool:
        """Whether tensor parallelism splits its input, rather than its output."""
        return self.name in _ROW_PARALLEL


def find_targets(model: nn.Module) -> list[Target]:
    """Every linear layer of ``model`` but the output head, in the model's order, those of one input together."""
    get_head: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    targets = [
        _target(path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and path.rpartition(".")[2] not in HEADS
    ]
    first: dict[str, int] = {}
    for i, target in enumerate(targets):
        first.setdefault(target.input_group, i)
    return sorted(targets, key=lambda target: first[target.input_group])


def select(targets: list[Target], config: AdapterConfig) -> list[Target]:
    """The targets that ``config`` adapts.

    Raises:
        ValueError: if a name matches no layer, or is an embedding or the output head.
    """
    if config.target_modules == ALL_LINEAR:
        return targets
    known = frozenset(target.name for target in targets)
    wanted = {TORCHTUNE.get(name, name) for name in config.target_modules}
    problems = [problem_with(name, known) for name in sorted(wanted - known)]
    if problems:
        raise ValueError("target_modules: " + "; ".join(problem for problem in problems if problem))
    return [target for target in targets if target.name in wanted]


def _target(path: str, module: nn.Linear) -> Target:
    parent, _, leaf = path.rpartition(".")
    name = TORCHTUNE.get(leaf, leaf)
    return Target(path, name, module.in_features, module.out_features, f"{parent}.{_SHARED_INPUT.get(name, name)}")
