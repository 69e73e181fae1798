"""A Markdown table of stored figures: ``python benchmarks/table.py benchmarks/results/step_h100.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Of the memory model's predictions, the one that is comparable with the measured peak.
_PREDICTED = "predicted_allocated_gib"


def markdown(path: str | Path) -> str:
    """One row a case and provider, one column a metric, the provenance below."""
    rows = json.loads(Path(path).read_text())
    rows = [row for row in rows if not row["metric"].startswith("predicted_") or row["metric"] == _PREDICTED]
    metrics = {row["metric"]: row["unit"] for row in rows}
    figures: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        figures.setdefault((row["case"], row["provider"]), {})[row["metric"]] = row["value"]
    head = ["case", "provider", *(f"{_words(name)} ({unit})" for name, unit in metrics.items())]
    lines = [head, ["---", "---", *["---:"] * len(metrics)]]
    lines += [
        [case, provider, *(_shown(values.get(metric)) for metric in metrics)]
        for (case, provider), values in figures.items()
    ]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    first, commits = rows[0], list(dict.fromkeys(row["commit"] for row in rows))
    named = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return f"{table}\n\n{first['device']}, torch {first['torch']}, {named}, {first['date']}."


def _words(metric: str) -> str:
    return metric.removeprefix("tokens_per_s_").removesuffix("_gib").replace("allocated", "peak").replace("_", " ")


def _shown(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    print(markdown(sys.argv[1]))
