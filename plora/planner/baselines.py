"""What people do today, planned by the same code and models, so that a claimed saving is a comparison.

* ``min_gpu``: one trial a job on the fewest devices it fits on, jobs side by side, eager peft (PLoRA's Min GPU).
* ``max_gpu``: one trial at a time over as many devices as its heads allow, eager peft (PLoRA's Max GPU).
* ``sequential_packed``: packs, one after another over as many devices as the heads allow (PLoRA's Sequential).
* ``best_one_at_a_time``: one trial at a time on each device group, each group loading the base once, with our step:
  compiled layers, packed sequences, the same batch. What packing itself gains is seen against this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from plora.planner.costs import Costs
from plora.planner.greedy import greedy
from plora.planner.jobs import Draft, Workshop, makespan, order_rounds, place
from plora.planner.problem import Problem
from plora.profiler.time import TimeModel

WORST = "min_gpu"
BEST = "best_one_at_a_time"


def baselines(problem: Problem, peft: TimeModel) -> dict[str, float]:
    """Predicted makespans in seconds of the baselines that can run at all.

    Args:
        problem: what is planned.
        peft: time model of eager training of one adapter (:func:`plora.profiler.one_at_a_time`).
    """
    eager = Workshop(replace(problem, time=peft, max_adapters=1))
    alone = Workshop(replace(problem, max_adapters=1))
    packed = Workshop(problem)
    n_devices = problem.n_devices
    plans: dict[str, Callable[[], list[Draft]]] = {
        "min_gpu": lambda: _one_job_each(eager, min),
        "max_gpu": lambda: _one_job_each(eager, max),
        "sequential_packed": lambda: _sequential(packed),
        "best_one_at_a_time": lambda: greedy(alone),
    }
    ends = {}
    for name, plan in plans.items():
        drafts = plan()
        if name in ("max_gpu", "sequential_packed"):
            load = drafts[0].costs.problem.load_seconds
            ends[name] = load + sum(draft.seconds for draft in drafts)
        else:
            ends[name] = makespan(place(drafts, n_devices))
    return ends


def _one_job_each(workshop: Workshop, which: Callable[[list[int]], int]) -> list[Draft]:
    drafts = []
    for k in range(len(workshop.problem.loads)):
        degree = which([d for d in workshop.degrees if workshop.table(d, k)])
        draft = workshop.draft(degree, frozenset({k}))
        assert draft is not None
        drafts.append(draft)
    # The longest first: kinder to the baseline than the order in which people write their loops.
    return sorted(drafts, key=lambda draft: -draft.seconds)


def _sequential(workshop: Workshop) -> list[Draft]:
    """First-fit packs at the largest degree, with the budget that ends first; trials that do not fit there go alone."""
    degree = workshop.degrees[-1]
    choices = []
    for costs in workshop.tables[degree]:
        inside = [k for k, fits in enumerate(costs.eligible) if fits]
        drafts = [order_rounds(costs, members) for members in first_fit(costs, inside)] if inside else []
        for k in range(len(workshop.problem.loads)):
            if not costs.eligible[k]:
                smaller = next(d for d in reversed(workshop.degrees) if workshop.table(d, k))
                alone = workshop.draft(smaller, frozenset({k}))
                assert alone is not None
                drafts.append(alone)
        choices.append(drafts)
    return min(choices, key=lambda drafts: sum(draft.seconds for draft in drafts))


def first_fit(costs: Costs, loads: Sequence[int] | None = None) -> list[list[int]]:
    """The better of two first-fit packings: by falling steps (packs of even length) and by falling size (fewest).

    Args:
        costs: the table; each load fits alone.
        loads: which loads; None for all.
    """
    loads = range(len(costs.problem.loads)) if loads is None else loads
    orders = (
        sorted(loads, key=lambda k: (-costs.steps[k], -costs.size[k])),
        sorted(loads, key=lambda k: (-costs.size[k], -costs.steps[k])),
    )
    return min(
        (_first_fit(costs, order) for order in orders), key=lambda packs: sum(costs.seconds(pack) for pack in packs)
    )


def _first_fit(costs: Costs, order: Sequence[int]) -> list[list[int]]:
    packs: list[list[int]] = []
    filled: list[int] = []
    for k in order:
        size = costs.size[k]
        for index, pack in enumerate(packs):
            if filled[index] + size <= costs.room and len(pack) < costs.max_live:
                pack.append(k)
                filled[index] += size
                break
        else:
            packs.append([k])
            filled.append(size)
    return packs
