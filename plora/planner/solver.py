"""Integer programs through PuLP: HiGHS first, CBC behind it; a feasible answer in time is an answer."""

from __future__ import annotations

import logging
import time

import pulp

logger = logging.getLogger(__name__)

# Best first: HiGHS runs in this process through highspy, CBC comes with PuLP 3.
SOLVERS = ("HiGHS", "PULP_CBC_CMD")
_NAMES = {"highs": "HiGHS", "cbc": "PULP_CBC_CMD"}
_PACKAGES = {"highs": "highspy", "cbc": "'pulp<4'"}


def available_solvers() -> list[str]:
    """The solvers installed here, best first, in our names (``highs``, ``cbc``)."""
    installed = set(pulp.listSolvers(onlyAvailable=True))
    return [ours for ours, theirs in _NAMES.items() if theirs in installed]


def choose_solver(name: str = "auto") -> str | None:
    """The solver to use: the one asked for, or the best installed; None where there is none (planning is then greedy).

    Raises:
        ValueError: if the name is unknown, or names a solver that is not installed.
    """
    installed = available_solvers()
    if name == "none":
        return None
    if name == "auto":
        if not installed:
            logger.warning("no solver for integer programs is installed (pip install highspy): planning greedily")
            return None
        return installed[0]
    if name not in _NAMES:
        raise ValueError(f"solver must be auto, none, {' or '.join(_NAMES)}, got {name!r}")
    if name not in installed:
        raise ValueError(
            f"solver {name} is not installed; installed: {', '.join(installed) or 'none'}. Use auto, or pip install "
            f"{_PACKAGES[name]}"
        )
    return name


def solve(problem: pulp.LpProblem, solver: str, *, time_limit: float, gap: float = 0.0) -> bool:
    """Solve in place.

    Args:
        problem: the program.
        solver: a name from :func:`available_solvers`.
        time_limit: seconds.
        gap: relative gap at which to stop.

    Returns:
        Whether the variables hold a feasible integer answer, proven optimal or not.
    """
    began = time.monotonic()
    engine = pulp.getSolver(_NAMES[solver], msg=False, timeLimit=max(0.1, time_limit), gapRel=gap, threads=1)
    try:
        problem.solve(engine)
    except pulp.PulpSolverError as error:
        logger.warning("solver %s failed on %s: %s", solver, problem.name, error)
        return False
    # HiGHS reports a solution found at the time limit as "not solved" with the values filled in, so look at the values.
    feasible = problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible) or (
        problem.status == pulp.LpStatusNotSolved and _has_integer_values(problem)
    )
    logger.debug("%s: %s in %.2f s (%s)", problem.name, pulp.LpStatus[problem.status], time.monotonic() - began, solver)
    return feasible


def whole(variable: pulp.LpVariable) -> int:
    """The value of an integer variable."""
    value = variable.value()
    assert value is not None
    return round(value)


def _has_integer_values(problem: pulp.LpProblem) -> bool:
    for variable in problem.variables():
        value = variable.value()
        if value is None or (variable.cat == pulp.LpInteger and abs(value - round(value)) > 1e-5):
            return False
    return all(constraint.valid(1e-4) for constraint in problem.constraints.values())
