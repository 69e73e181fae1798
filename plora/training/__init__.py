"""Training one pack: rounds, loss, optimizer, evaluation and generation."""

from plora.training.budget import TokenBudget
from plora.training.evaluation import BASE
from plora.training.job import PackJob
from plora.training.metrics import Score
from plora.training.records import (
    VAL_LOSS,
    EvalRecord,
    JobSettings,
    Listener,
    RoundRecord,
    Scorer,
    StepRecord,
    TrialResult,
)

__all__ = [
    "BASE",
    "VAL_LOSS",
    "EvalRecord",
    "JobSettings",
    "Listener",
    "PackJob",
    "RoundRecord",
    "Score",
    "Scorer",
    "StepRecord",
    "TokenBudget",
    "TrialResult",
]
