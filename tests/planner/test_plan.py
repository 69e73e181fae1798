from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora.planner import Plan, check_plan, make_plan
from plora.planner.plan import PLAN_VERSION, replay, retimed
from tests.planner.instances import GIB, assert_sound, grid, load, problem, problems


@pytest.fixture(scope="module")
def given_problem():
    return problem(grid(16), count=2)


@pytest.fixture(scope="module")
def plan(given_problem):
    return make_plan(given_problem, time_limit=1)


@settings(max_examples=15, deadline=None)
@given(problems(6))
def test_a_plan_survives_its_file_and_the_check(tmp_path_factory, given_problem):
    plan = make_plan(given_problem, time_limit=0.3)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert Plan.load(path).to_json() == path.read_text()
    check_plan(plan, given_problem)
    again = replay(given_problem, plan)
    assert max(job.end for job in again) == pytest.approx(plan.makespan)


def test_the_file_says_its_version_first(plan):
    data = json.loads(plan.to_json())
    assert next(iter(data)) == "version"
    assert data["version"] == PLAN_VERSION
    assert {"name", "rank", "start_round", "steps", "tokens_per_step"} == set(data["jobs"][0]["trials"][0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a plan"),
        ("[]", "it has no version"),
        ('{"version": 99}', "another version"),
        ('{"version": 2, "jobs": []}', "not a plan: it has no jobs"),
        ("[" * 100_000, "not a plan"),
        ('{"version": 2}', "the plan has no list of jobs"),
        ('{"version": 2, "jobs": 3}', "the plan has no list of jobs, got 3"),
        ('{"version": 2, "jobs": [null]}', r"jobs\[0\] must be an object, got None"),
        ('{"version": 2, "jobs": [{"trials": [[]]}]}', r"jobs\[0\].trials\[0\] must be an object, got \[\]"),
        ('{"version": 2, "jobs": [{"trials": [{"nome": 1}]}]}', r"jobs\[0\].trials\[0\] has what no plan has: nome"),
        ('{"version": 2, "jobs": [{"trials": [{"name": "a"}]}]}', r"trials\[0\] lacks rank, start_round, steps, tok"),
        ('{"version": 2, "jobs": [{"trials": [], "devices": 0}]}', r"jobs\[0\] has no list of devices, got 0"),
    ],
)
def test_a_file_that_is_no_plan_is_named(tmp_path, text, message):
    path = tmp_path / "my_plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"my_plan\.json: .*{message}"):
        Plan.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no plan file .*gone\.json"):
        Plan.load(tmp_path / "gone.json")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: Is a directory"):
        Plan.load(tmp_path)
    (tmp_path / "my_plan.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"my_plan\.json: not a plan: it is not text"):
        Plan.load(tmp_path / "my_plan.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"foo": 1}, "the plan has what no plan has: foo; remove it"),
        ({"free_bytes": 1e400}, "free_bytes must be a whole number of at least 0, got inf"),
        ({"model": None}, "not a plan: model must be text, got None"),
    ],
)
def test_a_field_that_is_wrong_is_named(plan, change, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps({**json.loads(plan.to_json()), **change}))


def _edited(plan, number, **changes):
    jobs = list(plan.jobs)
    jobs[number] = replace(jobs[number], **changes)
    return replace(plan, jobs=tuple(jobs))


def test_every_mismatch_is_in_one_list(plan, given_problem):
    first, second = plan.jobs[0], plan.jobs[1]
    stolen = _edited(plan, 0, trials=(*first.trials, second.trials[0]), token_budget=100)
    stolen = replace(stolen, model="Other")
    with pytest.raises(ValueError) as caught:
        check_plan(stolen, given_problem)
    text = str(caught.value)
    assert "for the model Other, not Qwen2.5-7B" in text
    assert f"trial {second.trials[0].name} is in job {first.number} and in job {second.number}" in text
    assert "microbatches of 100 tokens, its longest sequence 512" in text
    assert "in 3 ways" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": (7,)}, r"on devices \[7\], there are 0 to 1"),
        ({"devices": (0, 0)}, r"on devices \[0, 0\]: they must be neighbours"),
        ({"devices": (0, 1, 2)}, "tensor-parallel degree 3, allowed are 1, 2"),
        ({"trials": ()}, "has no trials"),
        ({"token_budget": 1 << 17}, r"job 0 needs .* on each device, 23.0 GiB are free: lower its token_budget"),
    ],
)
def test_each_mismatch_of_a_job_is_found(plan, given_problem, change, message):
    with pytest.raises(ValueError, match=message):
        check_plan(_edited(plan, 0, **change), given_problem)


def test_jobs_that_share_a_device_are_found(plan, given_problem):
    other = plan.jobs[1]
    assert other.devices != plan.jobs[0].devices
    with pytest.raises(ValueError, match=r"at the same time: job 1 starts at .* s, job 0 ends at .* s"):
        check_plan(_edited(plan, 1, devices=plan.jobs[0].devices), given_problem)


def test_a_trial_that_would_join_at_another_round_is_found(plan, given_problem):
    job = plan.jobs[0]
    last = max(job.trials, key=lambda trial: trial.end_round)
    late = replace(last, start_round=last.end_round + 7)
    others = [trial for trial in job.trials if trial is not last]
    joins = max(trial.end_round for trial in others if trial.end_round <= late.start_round)
    with pytest.raises(ValueError, match=f"trial {late.name} starts in round .* set its start_round to {joins}"):
        check_plan(_edited(plan, 0, trials=(*others, late)), given_problem)
    shifted = [replace(trial, start_round=trial.start_round + 1) for trial in job.trials]
    with pytest.raises(ValueError, match="would join in round 0, with nothing before it"):
        check_plan(_edited(plan, 0, trials=tuple(shifted)), given_problem)


def test_devices_that_are_not_there_are_said_once():
    alone = problem([load("a")])
    made = make_plan(alone, time_limit=1)
    for devices, ways, message in (((5,), "one way", r"\[5\], there is only 0"), ((0, 0), "2 ways", "each once")):
        with pytest.raises(ValueError, match=rf"in {ways};(.|\n)*{message}"):
            check_plan(_edited(made, 0, devices=devices), alone)


def test_a_trial_twice_in_a_job_is_found(plan, given_problem):
    first = plan.jobs[0]
    with pytest.raises(ValueError, match=f"trial {first.trials[0].name} is twice in job 0: keep one"):
        check_plan(_edited(plan, 0, trials=(*first.trials, first.trials[0])), given_problem)


def test_microbatches_above_the_limit_are_found(plan, given_problem):
    limited = replace(given_problem, token_budget=512)
    with pytest.raises(ValueError, match="packing.tokens_per_microbatch is 512"):
        check_plan(_edited(plan, 0, token_budget=1024), limited)
    below = [replace(job, token_budget=512) for job in plan.jobs]
    check_plan(replace(plan, jobs=tuple(below)), limited)


def test_missing_and_changed_trials_and_less_memory_are_found(plan, given_problem):
    with pytest.raises(ValueError, match="trials in no job: extra"):
        check_plan(plan, problem([*grid(16), load("extra")], count=2))
    changed = [load("t000", 8, 2), *grid(16)[1:]]
    with pytest.raises(ValueError, match="trial t000 has rank 8 and 500 steps, the plan says rank 8 and 1000 steps"):
        check_plan(plan, problem(changed, count=2))
    with pytest.raises(ValueError, match=r"needs .* 20.0 GiB are free"):
        check_plan(plan, replace(given_problem, free_bytes=20 * GIB))
    with pytest.raises(ValueError, match="adapters alive at a time, max_adapters is 1"):
        check_plan(plan, replace(given_problem, max_adapters=1))


@settings(max_examples=10, deadline=None)
@given(problems(6))
def test_a_plan_fed_back_keeps_its_jobs_and_gets_the_times_of_today(given_problem):
    plan = make_plan(given_problem, time_limit=0.3)
    again = retimed(given_problem, plan)
    assert again.method == "given"
    assert again.makespan == pytest.approx(plan.makespan)
    assert [(job.devices, job.trials) for job in again.jobs] == [(job.devices, job.trials) for job in plan.jobs]
    assert [job.memory_bytes for job in again.jobs] == [job.memory_bytes for job in plan.jobs]
    costs = {d: replace(c, per_token=3 * c.per_token, floor=3 * c.floor) for d, c in given_problem.time.costs.items()}
    slower = replace(given_problem, time=replace(given_problem.time, costs=costs))
    late = retimed(slower, plan)
    assert late.makespan > again.makespan
    assert late.makespan >= late.lower_bound * (1 - 1e-9)


def _places(tree, path=()):
    """Every place in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_plan_edited_by_hand_is_sound_or_refused_with_a_message(plan, given_problem, data):
    tree = json.loads(plan.to_json())
    *path, last = data.draw(st.sampled_from([place for place in _places(tree) if place[0] != "version"]))
    node = tree
    for key in path:
        node = node[key]
    if isinstance(node, dict) and data.draw(st.booleans()):
        del node[last]
    else:
        node[last] = data.draw(st.sampled_from([None, -1, 0, 7, 10**9, 1.5, "x", [], {}, [0, 0], True]))
    try:
        edited = Plan.from_json(json.dumps(tree))
        check_plan(edited, given_problem)
    except ValueError:
        return
    assert_sound(retimed(given_problem, edited), given_problem)


@settings(max_examples=25, deadline=None)
@given(problems(8), st.randoms(use_true_random=False))
def test_every_trial_gets_its_turn_in_whatever_order_trials_end(given_problem, order):
    for job in make_plan(given_problem, time_limit=0.3).jobs:
        joined: set[str] = set()
        ended: set[str] = set()
        while len(ended) < len(job.trials):
            joined |= set(job.ready(joined, ended))
            assert joined - ended, "someone trains"
            ended.add(order.choice(sorted(joined - ended)))
