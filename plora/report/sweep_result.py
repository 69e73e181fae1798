"""What ``plora.sweep`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plora.report.results import TrialSummary
from plora.report.text import score, setting_value

if TYPE_CHECKING:
    import optuna
    import pandas

_ROWS = 15
_HIDDEN = ("place", "number", "best_step", "best_val_loss", "seconds", "tokens", "adapter_dir", "error", "tied")


@dataclass(frozen=True, repr=False, eq=False)
class SweepResult:
    """The outcome of a sweep; shows itself in a terminal and in a notebook.

    Args:
        results: all trials and the base model, best first, with the columns of ``results.csv``.
        best: the winner; its ``adapter_dir`` loads in peft. None if no trial completed.
        study: the Optuna study.
        output_dir: where everything lies.
    """

    results: pandas.DataFrame
    best: TrialSummary | None
    study: optuna.Study
    output_dir: Path

    def __repr__(self) -> str:
        return f"SweepResult({self._headline()})\n{self._shown().to_string(index=False)}{self._more()}"

    def _repr_html_(self) -> str:
        style = "font-variant-numeric:tabular-nums"
        table = self._shown().to_html(index=False, border=0, escape=True)
        report = Path(self.output_dir) / "report.html"
        return (
            f'<div style="{style}"><p><b>plora sweep</b>: {escape(self._headline())}</p>{table}'
            f"<p>{escape(self._more().strip())} Report: <code>{escape(str(report))}</code></p></div>"
        )

    def _headline(self) -> str:
        trials = int((self.results["number"].notna()).sum()) if len(self.results) else 0
        said = f"{trials} trials in {self.output_dir}"
        if self.best is None:
            return f"{said}, none completed"
        value, error, name = self.best.objective, self.best.objective_se, "objective"
        if value is None:
            value, error, name = self.best.val_loss, self.best.val_loss_se, "val_loss"
        return f"{said}, best {self.best.name} with {name} {score(value, error)}"

    def _shown(self) -> pandas.DataFrame:
        """The first rows as text, without columns that are the same for all trials or of no interest here."""
        table = self.results.drop(columns=[name for name in _HIDDEN if name in self.results])
        fixed = [
            name for name in table if len(table) > 1 and name not in ("trial", "objective") and _constant(table[name])
        ]
        return table.drop(columns=fixed).head(_ROWS).map(_text)

    def _more(self) -> str:
        hidden = len(self.results) - _ROWS
        return f"\n… {hidden} more in .results" if hidden > 0 else ""


def _constant(column: pandas.Series[Any]) -> bool:
    """Whether all trials agree; the base model, which has no settings, is not asked."""
    return bool(column.dropna().nunique() <= 1)


def _text(value: Any) -> str:
    import pandas

    return "–" if pandas.isna(value) else setting_value(value)
