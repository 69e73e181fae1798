"""Scores, their errors, and ties."""

import math

import numpy as np
import pytest

from plora.data.types import Example
from plora.training.metrics import Score, exact_match, load_metric, tied_with_winner

NONE = np.zeros(0, dtype=np.int32)


def example(answer: str) -> Example:
    return Example(NONE, NONE, NONE, answer)


@pytest.mark.parametrize(
    ("pattern", "prediction", "answer", "expected"),
    [
        (None, "2024-01-31 ", "2024-01-31", 1.0),
        (None, "2024-01-30", "2024-01-31", 0.0),
        (r"####\s*([-\d.,]+)", "so #### 3 and #### 1,234.", "work\n#### 1234", 1.0),
        (r"####\s*([-\d.,]+)", "#### 1234 no, #### 12", "#### 1234", 0.0),
        (r"####\s*([-\d.,]+)", "1234", "#### 1234", 0.0),
        (r"####\s*([-\d.,]+)", "#### 42", "42", 1.0),
        (r"\d{4}-\d\d-\d\d", "it is 2024-01-31, surely", "2024-01-31", 1.0),
        (r"yes|no", "no, yes", "yes", 1.0),
        (None, "1,2", "12", 0.0),
    ],
)
def test_exact_match(pattern: str | None, prediction: str, answer: str, expected: float) -> None:
    assert exact_match(pattern)(prediction, example(answer)) == expected


def test_bad_regex_is_refused_with_its_text() -> None:
    with pytest.raises(ValueError, match=r"'\(\[' is not a regular expression"):
        exact_match("([")


def test_metric_by_dotted_path() -> None:
    assert load_metric("math.hypot")(3, 4) == 5
    for path in ("math.nothing", "no_such_module.f", "plain", "math.pi"):
        with pytest.raises(ValueError, match=path):
            load_metric(path)


def test_weighted_mean_and_its_error_agree_with_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 20, 400).astype(float)
    values = rng.normal(1.0, 0.5, 400) + 0.02 * weights
    score = Score.mean(values.tolist(), weights.tolist())
    assert score.value == pytest.approx((values * weights).sum() / weights.sum())
    picks = rng.integers(0, 400, (4000, 400))
    bootstrap = ((values * weights)[picks].sum(1) / weights[picks].sum(1)).std()
    assert score.stderr == pytest.approx(bootstrap, rel=0.05)


def test_unweighted_error_is_the_usual_one() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert Score.mean(values).stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert math.isnan(Score.mean([1.0]).stderr)
    with pytest.raises(ValueError, match="no examples"):
        Score.mean([])


def test_paired_examples_tell_apart_what_means_cannot() -> None:
    noise = np.random.default_rng(1).normal(0, 1, 200)
    best, worse = noise + 1.0, noise + 1.02
    paired = {name: Score.mean(v.tolist(), examples="val") for name, v in {"a": best, "b": worse}.items()}
    assert tied_with_winner(paired, maximize=False) == {"a"}
    unpaired = {"a": paired["a"], "b": Score.mean(worse.tolist(), examples="other")}
    assert tied_with_winner(unpaired, maximize=False) == {"a", "b"}


def test_noisy_difference_is_a_tie_and_nan_never_wins() -> None:
    rng = np.random.default_rng(2)
    scores = {f"t{i}": Score.mean(rng.normal(0, 1, 50).tolist(), examples="val") for i in range(2)}
    scores["nan"] = Score.mean([math.nan] * 50, examples="val")
    scores["far"] = Score.mean([-5.0] * 50, examples="val")
    assert tied_with_winner(scores, maximize=True) == {"t0", "t1"}
    assert tied_with_winner({"nan": scores["nan"]}, maximize=True) == set()
