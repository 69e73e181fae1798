"""The dropout mask: right rate, independent of what shares the microbatch, different between keys."""

from __future__ import annotations

import pytest
import torch

from plora.kernels.dropout import RESOLUTION, combine, keep_mask, scaled_mask, threshold


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    mask = scaled_mask(combine(3, 1), torch.arange(2000), 999, threshold(p), torch.float32)
    dropped = (mask == 0).float().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5 + 1 / RESOLUTION
    assert abs(mask.mean().item() - 1) < 0.01


def test_depends_on_the_token_not_on_its_row():
    index = torch.arange(50, dtype=torch.int32)
    whole = keep_mask(combine(1, 2), index, 33, threshold(0.3))
    assert torch.equal(keep_mask(combine(1, 2), index[20:30], 33, threshold(0.3)), whole[20:30])


def test_even_and_odd_features_and_neighbours_are_uncorrelated():
    mask = keep_mask(combine(5, 6), torch.arange(4000), 64, threshold(0.5)).float() - 0.5
    for other in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(2, 1)):
        assert abs((mask * other).mean().item()) < 0.005


@pytest.mark.parametrize("change", [(0, 1, 0), (0, 0, 1), (1, 0, 0)])
def test_keys_give_different_masks(change):
    index = torch.arange(500)
    first = keep_mask(combine(1, 2, 3), index, 100, threshold(0.5)).float()
    second = keep_mask(
        combine(*(a + b for a, b in zip((1, 2, 3), change, strict=True))), index, 100, threshold(0.5)
    ).float()
    assert abs((first == second).float().mean().item() - 0.5) < 0.02


def test_zero_is_no_dropout_and_near_one_keeps_something_finite():
    assert threshold(0.0) == 0
    assert threshold(0.999999) < RESOLUTION
