"""Who trains with whom, on which devices, and when."""

from plora.planner.check import check_plan
from plora.planner.plan import Plan, PlannedJob, PlannedTrial, retimed
from plora.planner.planner import make_plan
from plora.planner.problem import Load, Problem, legal_degrees, load_trials
from plora.planner.simulate import Simulation, simulate
from plora.planner.sweep import make_problem, plan_on

__all__ = [
    "Load",
    "Plan",
    "PlannedJob",
    "PlannedTrial",
    "Problem",
    "Simulation",
    "check_plan",
    "legal_degrees",
    "load_trials",
    "make_plan",
    "make_problem",
    "plan_on",
    "retimed",
    "simulate",
]
