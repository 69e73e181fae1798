"""Adapters in peft's format, out and in.

Shapes: ``R`` rank, ``D`` in-features, ``N`` out-features of the adapted linear.

peft itself is not needed: the format is two files, and what is written here is read by peft, vLLM and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from plora.checkpoint.atomic import atomic_directory
from plora.checkpoint.state import read_safetensors
from plora.modules.config import AdapterConfig

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A ``[R, D]`` and B ``[N, R]`` of each adapted linear, by its path."""

HFName = Callable[[str], str] | Mapping[str, str]
ExportRows = Callable[[str], torch.Tensor | None] | Mapping[str, torch.Tensor | None]


class SavesPretrained(Protocol):
    """A tokenizer: anything that writes itself, chat template included, into a directory."""

    def save_pretrained(self, directory: str, /) -> Any:
        """Writes itself into ``directory``."""


def export_adapter(
    directory: str | Path,
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    config: AdapterConfig,
    hf_names: HFName,
    export_rows: ExportRows,
    base_name: str,
    revision: str | None,
    dtype: str = "bf16",
    tokenizer: SavesPretrained | None = None,
    base_modules: Iterable[str] | None = None,
) -> Path:
    """Writes an adapter that peft, vLLM and transformers load on the Hugging Face base model.

    The directory appears complete or not at all; an earlier one is replaced.

    Args:
        directory: where to; made for this adapter alone.
        factors: A ``[R, D]`` and B ``[N, R]`` by module path of our base model.
        config: the adapter's settings.
        hf_names: module path to the module's path on the Hugging Face model.
        export_rows: module path to the permutation p with ``B_hf = B[p]``, or None for identity.
        base_name: hub id or folder of the base model.
        revision: its commit; None for a folder.
        dtype: of the written weights: ``bf16``, ``fp16`` or ``fp32``.
        tokenizer: saved beside the weights.
        base_modules: paths of all modules of the Hugging Face model that a target name might match. Where a
            layer name matches more of them than were trained, full paths are written. None takes it that
            every module with a trained layer name was trained.

    Returns:
        The directory.

    Raises:
        ValueError: for an unknown dtype.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"export dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    assert factors, "an adapter without factors"
    hf_factors = _to_hf(factors, config.rank, hf_names, export_rows)
    weights = {}
    for name, pair in hf_factors.items():
        for suffix, factor in zip(_SUFFIXES, pair, strict=True):
            weights[_PREFIX + name + suffix] = factor.detach().to("cpu", _DTYPES[dtype]).contiguous().clone()
    settings = _peft_config(config, target_modules(hf_factors, base_modules), base_name, revision)
    with atomic_directory(directory) as partial:
        save_file(weights, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
    return Path(directory)


def target_modules(trained: Iterable[str], base_modules: Iterable[str] | None) -> list[str]:
    """The shortest names that make peft adapt exactly ``trained``: layer names where that is enough, else paths."""
    trained = set(trained)
    leaves = {path.rpartition(".")[2] for path in trained}
    targets = set()
    for leaf in leaves:
        of_leaf = {path for path in trained if _matches(path, leaf)}
        in_base = of_leaf if base_modules is None else {path for path in base_modules if _matches(path, leaf)}
        targets |= {leaf} if in_base <= of_leaf else of_leaf
    return sorted(targets)


def import_adapter(directory: str | Path) -> tuple[AdapterConfig, Factors]:
    """Reads a LoRA adapter in peft's format, ours or another's.

    Returns:
        Its settings, and its factors in fp32 by Hugging Face module path: A ``[R, D]``, B ``[N, R]``, rows of B in
        the Hugging Face model's order (``to_base_layout`` turns them into a base model's own).

    Raises:
        ValueError: if a file is damaged, or the adapter is more than a plain LoRA of one rank; says what it has.
        FileNotFoundError: if the directory holds no adapter in safetensors.
    """
    directory = Path(directory)
    settings = _read_config(directory / CONFIG_FILE)
    _refuse_unsupported(directory, settings)
    tensors, _ = read_safetensors(directory / WEIGHTS_FILE)
    factors = _pair_factors(directory / WEIGHTS_FILE, tensors, settings["r"])
    config = AdapterConfig(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        dropout=float(settings.get("lora_dropout") or 0.0),
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in factors})),
        rslora=bool(settings.get("use_rslora")),
    )
    return config, factors


def to_base_layout(
    hf_factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    module_paths: Iterable[str],
    hf_names: HFName,
    export_rows: ExportRows,
) -> Factors:
    """Factors by Hugging Face path, as ``import_adapter`` returns them, by path and in row order of our base model.

    Args:
        hf_factors: A ``[R, D]`` and B ``[N, R]`` by Hugging Face path.
        module_paths: paths of our base model's linears, those without factors included.
        hf_names: as in ``export_adapter``.
        export_rows: as in ``export_adapter``.

    Raises:
        ValueError: if a factor belongs to a module that the base model lacks.
    """
    by_hf_name = {_look_up(hf_names, path): path for path in module_paths}
    unknown = sorted(set(hf_factors) - set(by_hf_name))
    if unknown:
        raise ValueError(
            f"the adapter has weights for {len(unknown)} modules that the base model lacks, such as {unknown[0]!r}: "
            "was it trained on another model?"
        )
    factors = {}
    for name, (a, b) in hf_factors.items():
        path = by_hf_name[name]
        rows = _look_up(export_rows, path)
        factors[path] = (a, b if rows is None else b[torch.argsort(rows.to(b.device))])
    return factors


def _to_hf(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], rank: int, hf_names: HFName, export_rows: ExportRows
) -> Factors:
    renamed = {}
    for path, (a, b) in factors.items():
        assert a.shape[0] == b.shape[1] == rank, f"{path}: A {tuple(a.shape)} and B {tuple(b.shape)} at rank {rank}"
        rows = _look_up(export_rows, path)
        renamed[_look_up(hf_names, path)] = (a, b if rows is None else b[rows.to(b.device)])
    assert len(renamed) == len(factors), "two modules have one Hugging Face name"
    return renamed


def _look_up(table: Any, path: str) -> Any:
    return table(path) if callable(table) else table[path]


def _matches(path: str, target: str) -> bool:
    """How peft matches a name in ``target_modules``."""
    return path == target or path.endswith("." + target)


def _peft_config(config: AdapterConfig, targets: list[str], base_name: str, revision: str | None) -> dict[str, Any]:
    """``adapter_config.json``, with the keys that every peft since 0.7 knows: older ones refuse unknown keys."""
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no adapter: there is no {path.name}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} should hold a JSON object, got {type(settings).__name__}")
    return settings


# Values under which the trained factors add up to plain LoRA on the unchanged base. PiSSA, OLoRA, CorDA, LoftQ and
# LoRA-GA move a part of the base's weights into the adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_PLAIN_SWITCHES = ("use_rslora",)
_UNSUPPORTED = {
    "modules_to_save": "fully trained modules",
    "rank_pattern": "ranks that differ by layer",
    "alpha_pattern": "alphas that differ by layer",
    "lora_bias": "a bias on B",
    "fan_in_fan_out": "transposed weights",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "replicated layers",
    "target_parameters": "adapted parameters that belong to no linear layer",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}


def _refuse_unsupported(directory: Path, settings: Mapping[str, Any]) -> None:
    found = []
    if settings.get("peft_type") != "LORA":
        found.append(f"peft_type={settings.get('peft_type')!r} (only 'LORA' is read)")
    found += [f"{key}={settings[key]!r} ({what})" for key, what in _UNSUPPORTED.items() if settings.get(key)]
    found += [
        f"{key}={value!r} (a variant of LoRA)"
        for key, value in settings.items()
        if key.startswith("use_") and value and key not in _PLAIN_SWITCHES
    ]
    if settings.get("bias", "none") != "none":
        found.append(f"bias={settings['bias']!r} (trained biases)")
    if settings.get("init_lora_weights", True) not in _PLAIN_INITS:
        found.append(f"init_lora_weights={settings['init_lora_weights']!r} (changes the base's weights)")
    for key, kinds in (("r", int), ("lora_alpha", (int, float))):
        if not isinstance(settings.get(key), kinds) or isinstance(settings.get(key), bool):
            found.append(f"{key}={settings.get(key)!r} (a number is needed)")
    if found:
        raise ValueError(f"cannot read the adapter in {directory}: it has " + "; ".join(found))


def _pair_factors(file: Path, tensors: Mapping[str, torch.Tensor], rank: int) -> Factors:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None or not key.startswith(_PREFIX):
            raise ValueError(f"{file}: cannot use the tensor {key!r}: expected {_PREFIX}<module>.lora_A|lora_B.weight")
        halves.setdefault(key[len(_PREFIX) : -len(suffix)], {})[suffix] = tensor.float()
    factors = {}
    for path, pair in halves.items():
        if len(pair) != 2:
            raise ValueError(f"{file}: {path} has only one of lora_A and lora_B")
        a, b = (pair[suffix] for suffix in _SUFFIXES)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(
                f"{file}: {path} has A {tuple(a.shape)} and B {tuple(b.shape)}, but {CONFIG_FILE} says r={rank}"
            )
        factors[path] = (a, b)
    if not factors:
        raise ValueError(f"{file} holds no adapter weights")
    return factors
