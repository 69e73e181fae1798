"""Many LoRA adapters over one frozen model: packing them, routing rows to them, adding and removing."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn

from plora.kernels.dispatch import backend
from plora.kernels.dropout import combine, threshold
from plora.kernels.ops import GradientBuffer
from plora.kernels.reference import ABSENT, Tables
from plora.kernels.schedule import Counts, DeviceTables, one_piece, upload
from plora.modules.adapter import Adapter, Layout
from plora.modules.arena import Arena, aligned
from plora.modules.config import AdapterConfig, computed_rank
from plora.modules.linear import Group, PackedLoRALinear, Shared, deep_copy, refuse_to_pickle
from plora.modules.mlp import fuse_gated_mlps, restore_gated_mlps
from plora.modules.targets import Target, find_targets, select

ATTRIBUTE = "plora"
_SAVE = "save_pretrained"  # of Hugging Face models


def pack_adapters(
    model: nn.Module,
    configs: Sequence[AdapterConfig],
    *,
    capacity: int | None = None,
    dtype: torch.dtype | None = None,
) -> PackedAdapters:
    """Freeze ``model`` and give its linear layers many LoRA adapters at once.

    Works on any module whose linear layers are ``nn.Linear`` (or a subclass, as torchtune's NF4
    linear). The layers are replaced in place; ``packed.unpack()`` puts them back.

    Args:
        model: a torchtune or Hugging Face model, or any other module.
        configs: one per adapter; adapter ``i`` takes slot ``i``.
        capacity: slots in the tables. More can be added later, at the price of recompiling
            compiled layers once. Default: twice the adapters, at least 8.
        dtype: what the packed products compute in. Default: that of the model's floating parameters.

    Returns:
        The pack, also registered as ``model.plora``.

    Raises:
        ValueError: if the model is packed already, is an ``nn.Sequential`` or has no linear layer, or a target
            module is unknown.

    Example:
        >>> packed = plora.pack_adapters(model, [plora.AdapterConfig(rank=8), plora.AdapterConfig(rank=64)])
        >>> with packed.route([n_first, n_second]):  # rows of the first adapter, then of the second
        ...     model(tokens).backward(gradient)
    """
    if hasattr(model, ATTRIBUTE):
        raise ValueError(f"the model is packed already: use model.{ATTRIBUTE}.add(config), or unpack() it first")
    if isinstance(model, (nn.Sequential, nn.Linear)):
        kind = "nn.Sequential" if isinstance(model, nn.Sequential) else "nn.Linear"
        reason = "would call the adapters as a layer" if kind == "nn.Sequential" else "cannot replace itself"
        raise ValueError(f"an {kind} {reason}: put it into a module of your own first")
    if isinstance(configs, AdapterConfig):
        raise TypeError("configs must be a list of plora.AdapterConfig: write [config] for a single adapter")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating-point torch.dtype such as torch.bfloat16, got {dtype!r}")
    targets = find_targets(model)
    if not targets:
        raise ValueError(f"{type(model).__name__} has no linear layer to adapt")
    for config in configs:
        _select(targets, config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    reference = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    capacity = max(8, 2 * len(configs)) if capacity is None else max(capacity, len(configs), 1)
    packed = PackedAdapters(targets, configs, capacity, reference.device, dtype or reference.dtype)
    packed._trainable = trainable
    packed._wrap(model)
    model.add_module(ATTRIBUTE, packed)
    if hasattr(model, _SAVE):
        setattr(model, _SAVE, _refuse_to_save)
    for config in configs:
        packed.add(config)
    return packed


class PackedAdapters(nn.Module):
    """The adapters of one model. Made by ``pack_adapters``."""

    def __init__(
        self,
        targets: Sequence[Target],
        configs: Sequence[AdapterConfig],
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.targets = list(targets)
        numel = sum(aligned(Layout.of(select(self.targets, config), config.rank).numel) for config in configs)
        self.arena = Arena(max(numel, aligned(1)), device, dtype)
        self._offsets = _empty_offsets(self.targets, capacity)
        self._device_offsets: torch.Tensor | None = None
        self._offsets_version = -1
        # In a list, because the layers belong to the model and must not be registered here again.
        self._linears: list[PackedLoRALinear] = []
        # What `unpack` lets train again.
        self._trainable: list[nn.Parameter] = []
        self._routes = 0
        self._version = -1
        self._shared = Shared(
            anchor=torch.zeros(1, device=device, requires_grad=True),
            weight=self.arena.shadow,
            gradients=GradientBuffer(self.arena.grad),
            routed=torch.zeros(1, dtype=torch.bool),
            tables=Tables.empty(capacity),
            device_tables=None,
            token_index=torch.zeros(0, dtype=torch.int32, device=device),
            max_rank=computed_rank(max((config.rank for config in configs), default=1)),
        )

    @property
    def adapters(self) -> dict[int, Adapter]:
        """The live adapters by slot, ascending."""
        return {adapter.slot: adapter for adapter in self.children() if isinstance(adapter, Adapter)}

    @property
    def slots(self) -> list[int]:
        """The slots in use, ascending."""
        return list(self.adapters)

    @property
    def capacity(self) -> int:
        """Slots in the tables."""
        return len(self._shared.tables.rank)

    def add(self, config: AdapterConfig) -> int:
        """Add a freshly initialised adapter and return its slot.

        Raises:
            ValueError: if it names an unknown target module.
        """
        targets = _select(self.targets, config)
        taken = set(self.slots)
        slot = next((i for i in range(self.capacity) if i not in taken), self.capacity)
        if slot == self.capacity:
            self._grow_tables()
        numel = self.arena.numel
        adapter = Adapter(slot, config, targets, self.arena)
        self._insert(adapter)
        tables = self._shared.tables
        tables.rank[slot], tables.scale[slot] = config.rank, config.scale
        tables.limit[slot] = threshold(config.dropout)
        for row, target in zip(self._offsets, self.targets, strict=True):
            if target.path in adapter.layout.a:
                row[slot] = adapter.start + adapter.layout.a[target.path].start
                row[self.capacity + slot] = adapter.start + adapter.layout.b[target.path].start
        self._shared.max_rank = max(self._shared.max_rank, computed_rank(config.rank))
        self.arena.refresh(adapter.range)
        if self.arena.numel != numel:
            self._bind()
        return slot

    def remove(self, slot: int) -> None:
        """Drop the adapter in ``slot``; its memory and slot are free for the next.

        Raises:
            KeyError: if the slot is empty.
        """
        adapter = self.adapters[slot]
        self._offsets[:, slot] = ABSENT
        self._offsets[:, self.capacity + slot] = ABSENT
        self._shared.tables.rank[slot] = self._shared.tables.limit[slot] = 0
        del self._modules[f"adapter_{slot}"]
        adapter.leave()
        self.arena.release(adapter.start, adapter.layout.numel)

    @contextmanager
    def route(
        self,
        tokens_per_adapter: Sequence[int] | Mapping[int, int],
        *,
        base_tokens: int = 0,
        token_index: torch.Tensor | None = None,
        steps: Mapping[int, int] | None = None,
        dropout: bool | None = None,
        work_counts: Counts | None = None,
        replace: Collection[int] = (),
    ) -> Iterator[None]:
        """Say which rows of the flattened input belong to which adapter, for the forwards inside.

        Backward may come after the context, but before the next ``route``; it refuses otherwise.

        Args:
            tokens_per_adapter: rows of each slot, as a list from slot 0 on or by slot. Rows are in
                order of the slots; any length is fine, zero too.
            base_tokens: rows after those of the adapters, which see the base alone.
            token_index: int32 ``[T]``, the index of each row within its adapter's own batch, which
                keys its dropout mask. Default: rows counted from the adapter's first one.
            steps: the step of each slot, which keys its dropout mask. Default: a count of routes.
            dropout: whether dropout is on. Default: whether the model is in training mode.
            work_counts: see the property of this name. Launches get at least as much room as these say, and a good deal
                more where that does not do, so that what was captured under one route serves similar ones.
            replace: slots whose gradients are to be this route's, in place of what was there: for one backward through
                the whole model, each layer once. It spares zeroing them where short batches let the kernels write.

        Raises:
            ValueError: if a row count is negative, or not zero for an empty slot.
        """
        counts = self._counts(tokens_per_adapter, base_tokens)
        shared, tables = self._shared, self._shared.tables
        tables.rows[1:] = torch.tensor([*counts, base_tokens]).cumsum(0)
        self._set_dropout(self.training if dropout is None else dropout, steps)
        shared.token_index = self._token_index(counts, base_tokens, token_index)
        self._update_device_tables(work_counts, self._zero_grad_unless_written(replace))
        for adapter in self.adapters.values():
            adapter.attach_gradients()
        if self._weights_version() != self._version:
            self.refresh()
        shared.routed.fill_(True)
        try:
            yield
        finally:
            shared.routed.fill_(False)

    def release_workspace(self) -> None:
        """Give back the kernels' workspace, which is as large as any microbatch so far has needed."""
        if self._shared.device_tables is not None:
            self._shared.device_tables.release_workspace()

    @property
    def work_counts(self) -> Counts | None:
        """How much the kernels' launches of this route have room for; None where the kernels do not run."""
        tables = self._shared.device_tables
        return None if tables is None else tables.counts

    @property
    def launch_key(self) -> tuple[Hashable, ...]:
        """What the kernels' launches of this route depend on beside ``work_counts`` and the shapes of activations.

        A CUDA graph captured under one route may be replayed under another of the same key and counts: whatever
        else differs, such as rows, ranks and dropout keys, is read from tensors that keep their place.
        """
        shared = self._shared
        there = [] if shared.device_tables is None else shared.device_tables.as_list()
        tensors = [self.arena.weight, shared.weight, shared.gradients.tensor, shared.token_index, *there[1:]]
        if self._device_offsets is not None:
            tensors.append(self._device_offsets)
        has_dropout = bool(shared.tables.limit.any())
        deterministic = torch.are_deterministic_algorithms_enabled()
        return (*(each.data_ptr() for each in tensors), self.capacity, shared.max_rank, has_dropout, deterministic)

    def refresh(self) -> None:
        """Bring the compute-dtype copy of the weights up to date.

        ``route`` does it where torch has seen the change; after writing to ``arena.weight`` call it.
        """
        self.arena.refresh()
        self._version = self._weights_version()

    def zero_grad_(self) -> None:
        """Zero every adapter's gradient."""
        self.arena.grad.zero_()

    def unpack(self, model: nn.Module) -> None:
        """Put the linear layers back into ``model``, drop the adapters, and let train again what did before.

        Raises:
            ValueError: if ``model`` is not packed, or is packed with other adapters.
        """
        if getattr(model, ATTRIBUTE, None) is not self:
            raise ValueError(f"these adapters are not those of this {type(model).__name__}: use model.plora.unpack")
        for target, linear in zip(self.targets, self._linears, strict=True):
            model.set_submodule(target.path, linear.base)
        restore_gated_mlps(model)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        delattr(model, ATTRIBUTE)
        model.__dict__.pop(_SAVE, None)

    def _wrap(self, model: nn.Module) -> None:
        for target in self.targets:
            base = model.get_submodule(target.path)
            assert isinstance(base, nn.Linear)
            linear = PackedLoRALinear(base)
            self._linears.append(linear)
            model.set_submodule(target.path, linear)
        self._bind()
        fuse_gated_mlps(model)

    def _counts(self, tokens: Sequence[int] | Mapping[int, int], base_tokens: int) -> list[int]:
        if not isinstance(tokens, Iterable) or isinstance(tokens, str):
            raise TypeError(f"route() takes a list of row counts, or a mapping from slots to them, got {tokens!r}")
        by_slot = dict(tokens) if isinstance(tokens, Mapping) else dict(enumerate(tokens))
        taken = set(self.slots)
        for slot, count in by_slot.items():
            if count < 0 or (count and slot not in taken):
                reason = "must not be negative" if count < 0 else "has no adapter"
                raise ValueError(f"slot {slot} {reason}: route() got {count} tokens for it; slots in use: {self.slots}")
        if base_tokens < 0:
            raise ValueError(f"base_tokens must not be negative, got {base_tokens}")
        return [by_slot.get(slot, 0) for slot in range(self.capacity)]

    def _set_dropout(self, active: bool, steps: Mapping[int, int] | None) -> None:
        tables = self._shared.tables
        self._routes += 1
        for slot, adapter in self.adapters.items():
            limit = threshold(adapter.config.dropout) if active else 0
            tables.limit[slot] = limit
            if limit:
                step = self._routes if steps is None else steps.get(slot, 0)
                tables.key[slot] = combine(adapter.config.seed, step)

    def _zero_grad_unless_written(self, slots: Collection[int]) -> list[int]:
        """Those of the slots whose gradients the kernels will write whole; zero those of the others."""
        if not slots:  # as in every pass that has no backward
            return []
        alone, adapters = one_piece(self._shared.tables), self.adapters
        written = [slot for slot in slots if self._shared.device_tables is not None and alone[slot]]
        for slot in set(slots).difference(written):
            self.arena.grad[adapters[slot].range].zero_()
        return written

    def _token_index(self, counts: list[int], base_tokens: int, given: torch.Tensor | None) -> torch.Tensor:
        total = sum(counts) + base_tokens
        if given is None:
            given = torch.cat([torch.arange(count) for count in (*counts, base_tokens)])
        if given.shape != (total,):
            raise ValueError(f"token_index must have shape [{total}], one entry a row, got {list(given.shape)}")
        return upload(given.to(torch.int32), self.arena.device)

    def _weights_version(self) -> int:
        versions = (adapter.A._version + adapter.B._version for adapter in self.adapters.values())
        return self.arena.weight._version + sum(versions)

    def _insert(self, adapter: Adapter) -> None:
        """Register an adapter so that iteration stays in order of the slots."""
        ordered = sorted([*self.adapters.values(), adapter], key=lambda each: each.slot)
        for each in ordered:
            self._modules.pop(f"adapter_{each.slot}", None)
        for each in ordered:
            self.add_module(f"adapter_{each.slot}", each)

    def _grow_tables(self) -> None:
        old, old_capacity = self._shared.tables, self.capacity
        grown = Tables.empty(2 * old_capacity)
        for name in ("rank", "scale", "limit", "key"):
            getattr(grown, name)[:old_capacity] = getattr(old, name)
        offsets = _empty_offsets(self.targets, 2 * old_capacity)
        offsets[:, :old_capacity] = self._offsets[:, :old_capacity]
        offsets[:, 2 * old_capacity : 3 * old_capacity] = self._offsets[:, old_capacity:-1]
        self._offsets, self._shared.tables = offsets, grown
        self._bind()

    def _bind(self) -> None:
        """Hand the layers and adapters the tensors they read, after any of them was replaced."""
        self._shared.weight, self._shared.gradients.tensor = self.arena.shadow, self.arena.grad
        self._bind_device_tables()
        for i, (linear, siblings) in enumerate(zip(self._linears, self._siblings(), strict=True)):
            linear.group, linear.siblings = self._group(slice(i, i + 1)), self._group(siblings)
        for adapter in self.adapters.values():
            adapter.tie()

    def _group(self, rows: slice) -> Group:
        there = self._device_offsets
        return Group(self._offsets[rows], None if there is None else there[rows], self._shared)

    def _siblings(self) -> Iterator[slice]:
        """For each target the rows of ``_offsets`` of those that read the same input."""
        start = 0
        for _, group in groupby(self.targets, key=lambda target: target.input_group):
            count = len(list(group))
            yield from [slice(start, start + count)] * count
            start += count

    def _bind_device_tables(self) -> None:
        """Keep tables on the device where the CUDA kernels can take this pack, and only there."""
        device, shared = self.arena.device, self._shared
        taken = device.type == "cuda" and self.arena.dtype == torch.bfloat16 and backend().name == "cuda"
        if not taken:
            shared.device_tables = self._device_offsets = None
            return
        old, device = self._device_offsets, self.arena.weight.device
        if old is None or old.shape != self._offsets.shape or old.device != device:
            shared.device_tables = DeviceTables(device)
            self._device_offsets, self._offsets_version = self._offsets.to(device), -1

    def _update_device_tables(self, work_counts: Counts | None, replaced: Collection[int]) -> None:
        shared = self._shared
        if shared.device_tables is None or self._device_offsets is None:
            return
        shared.device_tables.update(shared.tables, work_counts, replaced)
        if self._offsets._version != self._offsets_version:
            self._device_offsets.copy_(upload(self._offsets, self.arena.device))
            self._offsets_version = self._offsets._version

    def _apply(self, fn: Any, recurse: bool = True) -> PackedAdapters:
        # The adapters' parameters are views of the arena, so the arena moves and they are tied
        # again. A cast changes what is computed in; the weights themselves stay fp32.
        probe = fn(torch.empty(0, device=self.arena.device, dtype=self.arena.dtype))
        self.arena.move(probe.device, probe.dtype)
        shared = self._shared
        shared.anchor = shared.anchor.detach().to(probe.device).requires_grad_()
        shared.token_index = shared.token_index.to(probe.device)
        self._bind()
        return self

    __reduce_ex__ = refuse_to_pickle

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedAdapters:
        clone = deep_copy(self, memo)
        clone._bind()
        return clone


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """In place of ``save_pretrained``, which would write names that ``from_pretrained`` does not know."""
    raise ValueError(
        "a packed model cannot be saved by save_pretrained: write the adapters with "
        "plora.checkpoint.peft.export_adapter, and the model after packed.unpack(model)"
    )


def _select(targets: list[Target], config: AdapterConfig) -> list[Target]:
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"an adapter is described by a plora.AdapterConfig, got {config!r}")
    return select(targets, config)


def _empty_offsets(targets: Sequence[Target], capacity: int) -> torch.Tensor:
    """int64 ``[targets, 2 capacity + 1]``: no adapter anywhere, and the key of each layer's input."""
    offsets = torch.full((len(targets), 2 * capacity + 1), ABSENT, dtype=torch.int64)
    offsets[:, -1] = torch.tensor([combine(*target.input_group.encode()) for target in targets])
    return offsets
