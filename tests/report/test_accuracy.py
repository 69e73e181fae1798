from __future__ import annotations

import csv

import pytest

from plora.report.accuracy import Accuracy, Compared, warnings, write_accuracy

GIB = 1 << 30
JOB = Accuracy(
    "job 0",
    (
        Compared("memory, live tensors", 40 * GIB, 41 * GIB, "bytes"),
        Compared("memory, with the allocator's share", 60 * GIB, 44 * GIB, "bytes", is_limit=True),
        Compared("step", 0.2, 0.3, "s"),
        Compared("whole job", 1000.0, 800.0, "s"),
        Compared("unknown", 1.0, None, "s"),
    ),
)


def test_errors_are_relative_to_the_prediction():
    assert [figure.error for figure in JOB.figures] == [
        pytest.approx(0.025), pytest.approx(-0.2667, abs=1e-4), pytest.approx(0.5), pytest.approx(-0.2), None,
    ]  # fmt: skip
    assert [figure.is_off for figure in JOB.figures] == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("figure", "off"),
    [
        (Compared("whole job", 10.0, 14.0, "s"), False),  # four seconds matter to nobody
        (Compared("whole job", 10.0, 16.0, "s"), True),
        (Compared("whole job", 1000.0, 1149.0, "s"), False),
        (Compared("step", 0.010, 0.012, "s"), True),
        (Compared("memory, live tensors", GIB, 1.2 * GIB, "bytes"), False),
        (Compared("memory, live tensors", 10 * GIB, 12 * GIB, "bytes"), True),
        (Compared("a limit", 10 * GIB, 12 * GIB, "bytes", is_limit=True), True),
        (Compared("nothing predicted", 0.0, 12.0, "s"), False),
        (Compared("loading the base", 0.0006, 0.2, "s"), False),
        (Compared("loading the base", 0.0006, 20.0, "s"), True),
    ],
)
def test_what_counts_as_off(figure, off):
    assert figure.is_off is off


@pytest.mark.parametrize(
    ("figure", "shown"),
    [
        (Compared("loading the base", 0.0006, 0.2, "s"), ("1 ms", "200 ms", "–")),
        (Compared("loading the base", 4.0, 0.0, "s"), ("4.0 s", "0 ms", "–")),
        (Compared("loading the base", 8.0, 4.0, "s"), ("8.0 s", "4.0 s", "-50%")),
        (Compared("step", 0.010, 0.012, "s"), ("10 ms", "12 ms", "+20%")),
        (Compared("memory of the process", 1 << 20, 128 << 20, "bytes"), ("1 MiB", "128 MiB", "–")),
        (Compared("unknown", 10.0, None, "s"), ("10s", "–", "–")),
    ],
)
def test_the_difference_of_small_figures_is_not_told(figure, shown):
    assert figure.shown() == shown


def test_a_warning_names_the_job_the_figure_and_both_numbers():
    lines = warnings([JOB], estimated=True)
    assert lines == [
        "job 0, step: 50% more than predicted (from data sheets): 300 ms against 200 ms",
        "job 0, whole job: 20% less than predicted (from data sheets): 13m20s against 16m40s",
    ]
    assert "data sheets" not in warnings([JOB], estimated=False)[0]
    assert warnings([], estimated=True) == []


def test_the_file_has_a_line_for_each_figure(tmp_path):
    write_accuracy(tmp_path / "predictions.csv", [JOB])
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["figure"] for row in rows] == [figure.what for figure in JOB.figures]
    assert float(rows[2]["measured_over_predicted"]) == 1.5
    assert (rows[4]["measured"], rows[4]["measured_over_predicted"]) == ("", "")
    assert {row["of"] for row in rows} == {"job 0"}
