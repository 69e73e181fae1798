"""The generated dates are right, unique, disjoint by split, and the same every time."""

from __future__ import annotations

import datetime
import re

import pytest

from plora.data.dates import dates

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]


def parse(text: str) -> str:
    """An independent reading of every form."""
    if match := re.fullmatch(r"(\d{4})(\d\d)(\d\d)", text):
        return "-".join(match.groups())
    if match := re.fullmatch(r"(\d\d)/(\d\d)/(\d{4}) \((day|month) first\)", text):
        one, two, year, first = match.groups()
        return f"{year}-{two}-{one}" if first == "day" else f"{year}-{one}-{two}"
    if match := re.fullmatch(r"(\d+)\.(\d+)\.(\d{4})", text):
        return f"{match[3]}-{int(match[2]):02}-{int(match[1]):02}"
    year = re.search(r"\d{4}", text)[0]
    month = next(i for i, m in enumerate(_MONTHS, start=1) if re.search(rf"\b{m}", text.lower()))
    rest = text.replace(year, "")
    day = re.search(r"\d+", rest)
    if day is None:
        word = re.search(r"the ([a-z-]+)", text)[1]
        return f"{year}-{month:02}-{ordinals().index(word) + 1:02}"
    return f"{year}-{month:02}-{int(day[0]):02}"


def ordinals() -> list[str]:
    ones = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"]
    teens = [f"{stem}th" for stem in ("ten", "eleven", "twelf", "thirteen", "fourteen", "fifteen", "sixteen")]
    teens += ["seventeenth", "eighteenth", "nineteenth"]
    return [*ones, *teens, "twentieth", *(f"twenty-{o}" for o in ones), "thirtieth", "thirty-first"]


def test_answers_are_right() -> None:
    rows = dates(4000, seed=5)
    assert [parse(row["input"]) for row in rows] == [row["output"] for row in rows]
    forms = {re.sub(r"\d+", "0", re.sub(r"[A-Za-z-]+", "w", row["input"])) for row in rows}
    assert len(forms) >= 10


def test_weekdays_are_right() -> None:
    named = [row for row in dates(2000) if re.match(r"[A-Z][a-z]+day,", row["input"])]
    assert len(named) > 50
    for row in named:
        assert row["input"].startswith(f"{datetime.date.fromisoformat(row['output']):%A},")


def test_english_endings() -> None:
    text = " ".join(row["input"] for row in dates(8000))
    special = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}
    want = {f"{day}{special.get(day, 'th')}" for day in range(1, 32)}
    assert set(re.findall(r"\b\d+(?:st|nd|rd|th)\b", text)) == want


def test_splits_share_no_day_whatever_the_seed() -> None:
    train = {r["output"] for seed in (0, 1) for r in dates(20000, seed, "train")}
    val = {r["output"] for r in dates(3652, 7, "val")}
    test = {r["output"] for r in dates(3652, 0, "test")}
    assert not train & val
    assert not train & test
    assert not val & test
    assert len(val) == len(test) == 3652


def test_same_every_time_and_sliced() -> None:
    assert dates(50, 3) == dates(50, 3)
    assert dates(50, 3) != dates(50, 4)
    assert dates(50, 3, "train[10:20]") == dates(50, 3)[10:20]


@pytest.mark.parametrize(("n", "split"), [(0, "train"), (29221, "train"), (4000, "val"), (True, "train"), (5, "dev")])
def test_out_of_range(n: int, split: str) -> None:
    with pytest.raises(ValueError, match=r"must be a whole number from 1 to|no split 'dev'"):
        dates(n, split=split)
