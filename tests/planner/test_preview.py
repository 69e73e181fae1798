from __future__ import annotations

import re
import xml.etree.ElementTree
from dataclasses import replace

import pytest

from plora.planner import make_plan
from plora.planner.baselines import BEST, WORST, baselines
from plora.planner.preview import as_text, device_range, duration, gantt, summary, svg, to_html
from plora.profiler import GPUS, one_at_a_time
from tests.planner.instances import grid, load, problem


@pytest.fixture(scope="module")
def plan():
    given_problem = problem(grid(24), count=4)
    peft = one_at_a_time(given_problem.time, given_problem.memory, GPUS["a10"])
    return replace(make_plan(given_problem, time_limit=2), baselines=baselines(given_problem, peft))


def test_the_text_shows_every_job_device_and_total(plan):
    text = as_text(plan, 140)
    assert "Plan for Qwen2.5-7B on 4 x a10" in text
    for job in plan.jobs:
        assert re.search(rf"│\s+{job.number} │ {device_range(job.devices)}\s+│", text)
    for device in range(4):
        line = next(line for line in text.splitlines() if line.startswith(f"GPU {device}"))
        # The chart is as wide as the busy part of the device.
        busy = sum(job.seconds for job in plan.jobs if device in job.devices) / plan.makespan
        cells = line.split("|")[1]
        assert len(cells.strip()) / len(cells) == pytest.approx(busy, abs=0.03)
    assert duration(plan.makespan) in text
    assert f"the gap is {plan.gap:.1%}" in text
    assert text.count("it saves") == 2
    assert "estimated from data sheets" in text


def test_the_html_is_whole_and_draws_each_trial_once(plan):
    page = to_html(plan)
    assert "<script" not in page
    drawing = xml.etree.ElementTree.fromstring(svg(plan))
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawing.findall(f"{space}rect")) == len(plan.jobs)
    assert len(drawing.findall(f"{space}line")) == 24
    for line in summary(plan).splitlines():
        assert line in page


def test_a_plan_that_takes_longer_says_so():
    slow = make_plan(problem([load("a")], gpu="h100"), time_limit=1)
    text = summary(replace(slow, baselines={WORST: slow.makespan - 20, BEST: slow.makespan}))
    assert "1 trial in 1 job ends after" in text
    assert "it takes 20s longer: 0." in text
    assert "it saves 0s: 1.00x" in text


def test_a_number_too_long_for_its_bar_is_left_out(plan):
    first = replace(plan.jobs[0], number=12, start=0.0, seconds=2.0, devices=(0,))
    second = replace(plan.jobs[0], number=3, start=2.0, seconds=98.0, devices=(0,))
    chart = gantt(replace(plan, jobs=(first, second), n_devices=1, makespan=100.0), 64)
    bar = str(chart).splitlines()[0].split("|")[1]
    assert bar.count("3") == 1
    assert "1" not in bar
    assert bar.startswith("█")


def test_a_cpu_is_called_one_on_the_page_too(plan):
    assert ">CPU<" in svg(replace(plan, device="cpu", n_devices=1, jobs=plan.jobs[:1]))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (4.25, "4.2s"), (59.7, "1m 00s"), (754, "12m 34s"), (11220, "3h 07m")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_baselines_do_what_they_say():
    loads = [load(f"t{i}", 16, 8, examples=8000) for i in range(5)]
    given_problem = problem(loads, gpu="h100", count=4)
    peft = one_at_a_time(given_problem.time, given_problem.memory, GPUS["h100"])
    ends = baselines(given_problem, peft)

    def alone(time_model, degree):
        cost = time_model.cost(degree)
        params = given_problem.memory.adapter_params(16, degree=degree)
        tokens = loads[0].tokens_per_step
        return cost.start + 1000 * cost.round_seconds(tokens, 16 * tokens, 1, params, 1) + cost.save_seconds(params)

    # Five jobs on four devices: two rounds of one device each; or one after another on all four.
    assert ends["min_gpu"] == pytest.approx(2 * alone(peft, 1), rel=0.01)
    assert ends["max_gpu"] == pytest.approx(5 * alone(peft, 4), rel=0.01)
    assert ends["best_one_at_a_time"] < ends["min_gpu"]
    assert make_plan(given_problem).makespan <= min(ends.values())
