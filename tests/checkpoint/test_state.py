"""Exact states, and damaged files named."""

from __future__ import annotations

import pytest
import torch

from plora.checkpoint.state import load_state, save_state


def test_views_of_one_arena_come_back_to_the_bit(tmp_path):
    arena = torch.randn(1000)
    arena[3] = float("nan")
    arena[4] = -0.0
    arena[5] = 1e-42
    tensors = {
        "A": arena[:60].view(6, 10),
        "B": arena[60:120].view(6, 10).t(),
        "overlap": arena[50:70],
        "step": torch.tensor(7),
        "half": torch.randn(3).bfloat16(),
        "empty": torch.empty(0, 4),
    }
    path = tmp_path / "checkpoints" / "t001.safetensors"
    save_state(path, tensors, {"name": "t001", "step": 3, "loss": [1.5, None]})
    loaded, metadata = load_state(path)
    assert metadata == {"name": "t001", "step": 3, "loss": [1.5, None]}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        if tensor.numel():
            bits = [t.contiguous().view(torch.uint8) if t.ndim else t for t in (loaded[name], tensor)]
            assert torch.equal(*bits), name
    assert path.stat().st_size < 4000  # the views' own elements, not the arena behind them
    assert [p.name for p in path.parent.iterdir()] == ["t001.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "t001.safetensors"
    save_state(path, {"A": torch.randn(100)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"t001\.safetensors.*corrupt or truncated"):
        load_state(path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_state(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not an adapter state"):
        load_state(tmp_path / "other.safetensors")
