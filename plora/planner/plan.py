"""The plan: which trials share which devices, from when to when. Values and their JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from plora.planner.bounds import lower_bounds
from plora.planner.costs import Costs, make_costs
from plora.planner.jobs import Draft, Placed
from plora.planner.problem import Problem

PLAN_VERSION = 2
Value = TypeVar("Value", "PlannedTrial", "PlannedJob", "Plan")


@dataclass(frozen=True)
class PlannedTrial:
    """A trial's place in a job: it takes part in rounds ``[start_round, start_round + steps)``."""

    name: str
    rank: int
    start_round: int
    steps: int
    tokens_per_step: float

    def __post_init__(self) -> None:
        _text(self, "name")
        _number(self, "rank", 1, whole=True)
        _number(self, "start_round", 0, whole=True)
        _number(self, "steps", 1, whole=True)
        _number(self, "tokens_per_step", 0)

    @property
    def end_round(self) -> int:
        """The first round without it."""
        return self.start_round + self.steps


@dataclass(frozen=True)
class PlannedJob:
    """A pack on a device group.

    Args:
        number: the job's number, in order of start.
        devices: indices of its devices; their count is the tensor-parallel degree.
        token_budget: tokens of a microbatch.
        trials: in the order in which they join.
        start: predicted start in seconds after the first job's.
        seconds: predicted duration, with start-up, evaluation and saving.
        round_seconds: predicted seconds of its first round.
        allocated_bytes: predicted peak of live tensors on each of its devices, at the tokens that its rounds have.
        memory_bytes: what it is given: full microbatches, and the allocator's share.
    """

    number: int
    devices: tuple[int, ...]
    token_budget: int
    trials: tuple[PlannedTrial, ...]
    start: float
    seconds: float
    round_seconds: float
    allocated_bytes: int
    memory_bytes: int

    def __post_init__(self) -> None:
        for name, least in (("number", 0), ("token_budget", 1), ("allocated_bytes", 0), ("memory_bytes", 0)):
            _number(self, name, least, whole=True)
        for name in ("start", "seconds", "round_seconds"):
            _number(self, name, 0)
        if not all(isinstance(device, int) and not isinstance(device, bool) for device in self.devices):
            raise ValueError(f"job {self.number}: devices must be whole numbers, got {list(self.devices)}")

    @property
    def degree(self) -> int:
        """Tensor-parallel degree."""
        return len(self.devices)

    @property
    def end(self) -> float:
        """Predicted end in seconds."""
        return self.start + self.seconds

    @property
    def rounds(self) -> int:
        """Rounds until its last trial ends."""
        return max(trial.end_round for trial in self.trials)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of its first round."""
        return sum(trial.tokens_per_step for trial in self.trials if trial.start_round == 0)

    def ready(self, joined: Collection[str], ended: Collection[str]) -> list[str]:
        """Trials that may join now: those not joined whose planned predecessors have all ended.

        A trial's predecessors are those planned to end by its start round. Followed without surprises this is the plan;
        where trials stop early the later ones move forward, and the trials alive together are always among those that
        the plan has alive together at some round, so the predicted memory holds.
        """
        return [
            trial.name
            for trial in self.trials
            if trial.name not in joined
            and all(other.name in ended for other in self.trials if other.end_round <= trial.start_round)
        ]


@dataclass(frozen=True)
class Plan:
    """Jobs on devices, how long they are predicted to take, and how good that is.

    Args:
        model: the base model's name.
        dtype: of its weights: ``bf16``, ``fp32`` or ``nf4``.
        recomputed_layers: layers whose activations are recomputed in the backward pass.
        device: the device kind the time model is for.
        n_devices: devices planned for.
        free_bytes: bytes that were free on each.
        objective: what was optimised.
        method: the planner whose answer this is.
        estimated: whether the time model comes from a data sheet.
        makespan: predicted seconds from the first start to the last end.
        lower_bound: seconds before which no plan ends.
        bound_reason: which of ``Bounds`` that is.
        jobs: in order of start.
        baselines: predicted makespans of what people do today.
        candidates: predicted makespans of the other planners' answers.
        graph_tokens: most tokens of a microbatch that runs as a CUDA graph, 0 for none.
    """

    model: str
    dtype: str
    recomputed_layers: int
    device: str
    n_devices: int
    free_bytes: int
    objective: str
    method: str
    estimated: bool
    makespan: float
    lower_bound: float
    bound_reason: str
    jobs: tuple[PlannedJob, ...]
    baselines: Mapping[str, float] = field(default_factory=dict)
    candidates: Mapping[str, float] = field(default_factory=dict)
    graph_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("model", "dtype", "device"):
            _text(self, name)
        for name, least in (("recomputed_layers", 0), ("graph_tokens", 0), ("n_devices", 1), ("free_bytes", 0)):
            _number(self, name, least, whole=True)

    @property
    def load_seconds(self) -> float:
        """Seconds before the first job: loading the base."""
        return min(job.start for job in self.jobs)

    @property
    def gap(self) -> float:
        """How far the makespan is above the lower bound, relative: 0.02 is 2%."""
        return self.makespan / self.lower_bound - 1

    def to_json(self) -> str:
        """The plan as text; equal plans give equal text."""
        return json.dumps({"version": PLAN_VERSION, **asdict(self)}, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            ValueError: if it is missing, cannot be read, is not a plan, or of another version.
        """
        path = Path(path)
        if not path.exists():
            raise ValueError(f"there is no plan file {path}")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a plan: it is not text") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan in a text made by :meth:`to_json`.

        Raises:
            ValueError: if it is not one.
        """
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not a plan: {error}") from error
        if not isinstance(data, dict) or "version" not in data:
            raise ValueError("not a plan: it has no version")
        if data.pop("version") != PLAN_VERSION:
            raise ValueError(f"a plan of another version; this is version {PLAN_VERSION}: plan again")
        try:
            jobs = tuple(_job_from(job, f"jobs[{place}]") for place, job in enumerate(_list(data, "jobs", "the plan")))
            if not jobs:
                raise ValueError("it has no jobs")
            return _made(cls, {**data, "jobs": jobs}, "the plan")
        except ValueError as error:
            raise ValueError(f"not a plan: {error}") from error


def _number(value: Any, name: str, least: int, *, whole: bool = False) -> None:
    found = getattr(value, name)
    kinds = int if whole else (int, float)
    if isinstance(found, bool) or not isinstance(found, kinds) or not least <= found < float("inf"):
        raise ValueError(f"{name} must be a {'whole ' * whole}number of at least {least}, got {found!r}")


def _text(value: Any, name: str) -> None:
    if not isinstance(getattr(value, name), str):
        raise ValueError(f"{name} must be text, got {getattr(value, name)!r}")


def _job_from(data: Any, where: str) -> PlannedJob:
    places = enumerate(_list(data, "trials", where))
    trials = tuple(_made(PlannedTrial, trial, f"{where}.trials[{place}]") for place, trial in places)
    return _made(PlannedJob, {**data, "trials": trials, "devices": tuple(_list(data, "devices", where))}, where)


def _list(data: Any, key: str, where: str) -> list[Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, got {data!r}")
    if not isinstance(data.get(key), list):
        raise ValueError(f"{where} has no list of {key}" + (f", got {data[key]!r}" if key in data else ""))
    return data[key]


def _made(kind: type[Value], data: Any, where: str) -> Value:
    """A value of ``kind`` from its fields in a file; ``where`` names the place."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, got {data!r}")
    known = fields(kind)
    unknown = sorted(data.keys() - {each.name for each in known})
    if unknown:
        raise ValueError(f"{where} has what no plan has: {', '.join(unknown)}; remove it")
    required = {each.name for each in known if each.default is MISSING and each.default_factory is MISSING}
    if absent := sorted(required - data.keys()):
        raise ValueError(f"{where} lacks {', '.join(absent)}")
    try:
        return kind(**data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where != "the plan" else str(error)) from error


def plan_jobs_of(problem: Problem, placed: list[Placed]) -> tuple[PlannedJob, ...]:
    """Planned jobs of placed drafts, in order of start."""
    jobs = []
    for number, job in enumerate(sorted(placed, key=lambda job: (job.start, job.first_device))):
        draft, costs = job.draft, job.draft.costs
        loads = [problem.loads[k] for k in draft.members]
        size, rank = costs.peak_size(draft.members, draft.starts), max(load.rank for load in loads)
        likely = costs.largest_microbatch(draft.members, draft.starts)
        given, expected = (
            problem.memory.parts_from_bytes(size, tokens, rank, degree=draft.degree, generation=problem.generation)
            for tokens in (costs.tokens, likely)
        )
        jobs.append(
            PlannedJob(
                number=number,
                devices=tuple(range(job.first_device, job.first_device + draft.degree)),
                token_budget=costs.tokens,
                trials=tuple(
                    PlannedTrial(load.name, load.rank, start, load.steps, load.tokens_per_step)
                    for load, start in zip(loads, draft.starts, strict=True)
                ),
                start=job.start,
                seconds=draft.seconds,
                round_seconds=costs.segments(draft.members, draft.starts)[0].round_seconds,
                allocated_bytes=expected.allocated,
                memory_bytes=given.total,
            )
        )
    return tuple(jobs)


def replay(problem: Problem, plan: Plan) -> list[Placed]:
    """The plan's jobs under the cost models of ``problem``: same devices and rounds, each when these are free.

    The plan has been checked (:func:`plora.planner.check_plan`).
    """
    index = {load.name: k for k, load in enumerate(problem.loads)}
    free = [problem.load_seconds] * problem.n_devices
    placed = []
    for job in sorted(plan.jobs, key=lambda job: (job.start, job.number)):
        costs = _costs_of(problem, job)
        members = tuple(index[trial.name] for trial in job.trials)
        starts = tuple(trial.start_round for trial in job.trials)
        draft = Draft(costs, members, starts, costs.start + costs.seconds(members, starts))
        begin = max(free[device] for device in job.devices)
        for device in job.devices:
            free[device] = begin + draft.seconds
        placed.append(Placed(draft, job.devices[0], begin))
    return placed


def retimed(problem: Problem, plan: Plan) -> Plan:
    """The plan's jobs with times and memory as the cost models of ``problem`` predict them.

    The plan has been checked (:func:`plora.planner.check_plan`).
    """
    placed = replay(problem, plan)
    bounds = lower_bounds(problem)
    return replace(
        plan,
        device=problem.time.device,
        free_bytes=problem.free_bytes,
        method="given",
        estimated=problem.time.estimated,
        makespan=max(job.end for job in placed),
        lower_bound=bounds.best,
        bound_reason=bounds.reason,
        jobs=plan_jobs_of(problem, placed),
        baselines={},
        candidates={},
    )


def _costs_of(problem: Problem, job: PlannedJob) -> Costs:
    return make_costs(problem, job.degree, job.token_budget, max(trial.rank for trial in job.trials))
