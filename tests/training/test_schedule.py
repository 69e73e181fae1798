"""Learning rates against transformers' schedules."""

import pytest
import torch
import transformers

from plora.training.schedule import lr_factor, warmup_steps


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (7, 0), (40, 3), (40, 40), (100, 33)])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_equals_transformers(kind: str, total: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    if kind == "constant":
        theirs = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    else:
        make = getattr(transformers, f"get_{kind}_schedule_with_warmup")
        theirs = make(optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert lr_factor(step, total, warmup, kind) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_warmup_steps_are_those_of_transformers_trainer() -> None:
    for total, fraction in [(100, 0.03), (101, 0.03), (10, 0.0), (33, 0.1)]:
        arguments = transformers.TrainingArguments(output_dir="unused", warmup_steps=fraction, use_cpu=True)
        assert warmup_steps(total, fraction) == arguments.get_warmup_steps(total)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'polynomial'"):
        lr_factor(0, 10, 0, "polynomial")
