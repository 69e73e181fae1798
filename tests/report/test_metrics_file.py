"""What is written per step, and read back."""

from __future__ import annotations

import json
import math

from plora.checkpoint.layout import SweepLayout
from plora.report.metrics_file import MetricsFile, read_curve


def test_one_line_per_step_and_evaluation(tmp_path, make_trial, make_record, make_eval, make_result):
    layout = SweepLayout(tmp_path)
    file, first, second = MetricsFile(layout), make_trial(0), make_trial(1)
    file.on_eval(None, make_eval(0, val_loss=(2.5, 0.1)))
    for step in (1, 2):
        file.on_step(first, make_record(step, loss=1.0 / step, skipped=step == 2))
    file.on_step(second, make_record(1, loss=math.nan, grad_norm=math.inf, skipped=True))
    file.on_eval(first, make_eval(2, val_loss=(0.75, 0.05), exact_match=0.5))
    lines = [json.loads(line) for line in layout.metrics("default").read_text().splitlines()]  # flushed already
    step = {"kind": "step", "lr": 1e-4, "grad_norm": 0.5, "tokens": 100}
    assert lines == [
        {**step, "step": 1, "loss": 1.0, "skipped": False},
        {**step, "step": 2, "loss": 0.5, "skipped": True},
        {
            "kind": "eval",
            "step": 2,
            "task": "dataset",
            "val_loss": 0.75,
            "val_loss_se": 0.05,
            "exact_match": 0.5,
            "exact_match_se": None,
        },
    ]
    (line,) = layout.metrics("t001").read_text().splitlines()
    assert json.loads(line)["loss"] is None
    assert json.loads(line)["grad_norm"] is None
    assert read_curve(layout.metrics("base")).val == [(0, 2.5)]
    file.on_finish(first, make_result(first), None)
    file.close()


def test_curve_of_a_resumed_run_takes_the_later_value(tmp_path, make_trial, make_record, make_eval):
    layout = SweepLayout(tmp_path)
    trial = make_trial(0)
    for base in (0.0, 10.0):
        file = MetricsFile(layout)
        for step in (1, 2, 3) if base == 0 else (3, 4):
            file.on_step(trial, make_record(step, loss=base + step if step != 4 else math.nan))
        file.on_eval(trial, make_eval(2, val_loss=base + 0.5))
        file.close()
    curve = read_curve(layout.metrics("default"))
    assert curve.train[:3] == [(1, 1.0), (2, 2.0), (3, 13.0)]
    assert curve.train[3][0] == 4
    assert math.isnan(curve.train[3][1])
    assert curve.val == [(2, 10.5)]
    assert read_curve(tmp_path / "none").train == []
