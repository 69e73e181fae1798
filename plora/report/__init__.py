"""What people see of a sweep: the live view, trackers, the ranking and the report."""

from plora.report.html import write_report
from plora.report.info import SweepInfo
from plora.report.leaderboard import print_leaderboard
from plora.report.listener import Listener, Listeners
from plora.report.live import LiveView
from plora.report.metrics_file import Curve, MetricsFile, read_curve
from plora.report.results import (
    TrialSummary,
    base_summary,
    leaderboard,
    summary_of,
    to_dataframe,
    winner,
    write_csv,
)
from plora.report.sweep_result import SweepResult
from plora.report.trackers import MLflowLogger, TensorBoardLogger, Tracker, WandBLogger

__all__ = [
    "Curve",
    "Listener",
    "Listeners",
    "LiveView",
    "MLflowLogger",
    "MetricsFile",
    "SweepInfo",
    "SweepResult",
    "TensorBoardLogger",
    "Tracker",
    "TrialSummary",
    "WandBLogger",
    "base_summary",
    "leaderboard",
    "print_leaderboard",
    "read_curve",
    "summary_of",
    "to_dataframe",
    "winner",
    "write_csv",
    "write_report",
]
