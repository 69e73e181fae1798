"""Who trains with whom, on which devices, and when."""

from plora.planner.check import check_plan
from plora.planner.packing import Pack, Packing, choose_checkpointing, pack_trials
from plora.planner.plan import Plan, PlannedJob, PlannedTrial
from plora.planner.planner import make_plan
from plora.planner.problem import Load, Problem, legal_degrees, load_trials
from plora.planner.simulate import Simulation, simulate
from plora.planner.sweep import plan_on

__all__ = [
    "Load",
    "Pack",
    "Packing",
    "Plan",
    "PlannedJob",
    "PlannedTrial",
    "Problem",
    "Simulation",
    "check_plan",
    "choose_checkpointing",
    "legal_degrees",
    "load_trials",
    "make_plan",
    "pack_trials",
    "plan_on",
    "simulate",
]
