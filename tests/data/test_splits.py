"""Split strings mean what the datasets library means by them."""

from __future__ import annotations

import datasets
import pytest

from plora.data.splits import parse_split

SLICES = ["", "[:5]", "[-5:]", "[:-5]", "[3:7]", "[10%:20%]", "[:33%]", "[-25%:]"]


@pytest.mark.parametrize("text", [*(f"train{s}" for s in SLICES), "train[:2]+test[1:]"])
@pytest.mark.parametrize("n", [1, 10, 27, 150])
def test_as_datasets(text: str, n: int) -> None:
    sizes = {"train": n, "test": 4}
    rows = [(part.name, i) for part in parse_split(text) for i in part.rows(sizes[part.name])]
    try:
        absolute = datasets.ReadInstruction.from_spec(text).to_absolute(sizes)
    except ValueError:
        pytest.skip("the datasets library refuses bounds beyond the split")
    want = [(each.splitname, i) for each in absolute for i in range(sizes[each.splitname])[each.from_ : each.to]]
    assert rows == want


@pytest.mark.parametrize("text", ["", "train[", "train[5]", "train[a:b]", "train[:5", "train[::2]", "[:5]"])
def test_unreadable(text: str) -> None:
    with pytest.raises(ValueError, match="is not a split: write a name"):
        parse_split(text)
