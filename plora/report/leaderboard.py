"""The final ranking on the terminal, and how to use the best adapter."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from plora.report.accuracy import Accuracy
from plora.report.info import SweepInfo
from plora.report.results import DEFAULT, TrialSummary, title_of, varying_settings, winner
from plora.report.snippets import peft_snippet, vllm_snippet
from plora.report.text import count, duration, score, setting_title, setting_value

_MAX_ROWS = 25
_FILE_WIDTH = 240


def print_leaderboard(
    ranked: Sequence[TrialSummary], info: SweepInfo, console: Console | None = None, max_rows: int = _MAX_ROWS
) -> None:
    """Prints the ranking, what won, and the snippets that load it in peft and in vLLM.

    Args:
        ranked: the trials and the base model, as ``leaderboard`` orders them.
        info: the sweep.
        console: where to; None for standard output.
        max_rows: rows shown at most, besides the base model and the default trial.
    """
    console = console or _console()
    console.print()
    console.print(_table(ranked, info, max_rows))
    for line in notes(ranked, info, max_rows):
        console.print(Text(line), style="dim", soft_wrap=True)
    if info.accuracies:
        console.print(_accuracy_table(info.accuracies))
    console.print()
    best = winner(ranked)
    if best is None:
        console.print("[bold red]No trial completed, so there is no best adapter.[/]")
        return
    console.print(f"[bold green]{escape(verdict(ranked, info))}[/]", soft_wrap=True, highlight=False)
    for title, snippet in snippets(best, info).items():
        console.print(f"\n[bold]{title}[/]")
        # Printed bare: inside a frame, or wrapped, it could not be copied.
        console.print(Text(snippet), style="cyan", soft_wrap=True)


def _console() -> Console:
    """Standard output; a file has no width, and rich's 80 columns would cut most words of the table."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)


def marker(trial: TrialSummary, best: TrialSummary | None) -> str:
    """What sets a trial apart in the ranking: ``★`` the winner, ``≈`` tied with it."""
    if best is not None and trial.name == best.name:
        return "★"
    return "≈" if trial.tied else ""


def verdict(ranked: Sequence[TrialSummary], info: SweepInfo) -> str:
    """The outcome in one sentence or two: the winner, its score, and how the default and the base model did."""
    best = winner(ranked)
    assert best is not None
    said = f"Best adapter: {best.name}, {_scored(best, info)}"
    others = [trial for trial in ranked if trial is not best and (trial.is_base or trial.name == DEFAULT)]
    compared = [
        f"{title_of(trial)} {_scored(trial, info, named=False)}" for trial in others if _value(trial) is not None
    ]
    said += f" ({', '.join(compared)})." if compared else "."
    tests = [best, *(trial for trial in others if trial.test_score is not None)]
    if best.test_score is not None:
        shown = ", ".join(f"{title_of(trial)} {score(trial.test_score, trial.test_score_se)}" for trial in tests)
        said += f" On the test split, which chose nothing: {shown}."
    return said


def snippets(best: TrialSummary, info: SweepInfo) -> dict[str, str]:
    """Code that uses the adapter, by heading; empty where none was exported."""
    if best.adapter_dir is None:
        return {}
    found = {"Load it with peft": peft_snippet(best.adapter_dir, info.base_name, info.base_revision)}
    rank = best.settings.get("rank")
    if rank is not None:
        found["Serve it with vLLM"] = vllm_snippet(
            best.name, best.adapter_dir, int(rank), info.base_name, info.base_revision
        )
    return found


def notes(ranked: Sequence[TrialSummary], info: SweepInfo, max_rows: int | None = None) -> list[str]:
    """Lines under the ranking: what the marks mean, what it took, and what a reader should beware of."""
    best = winner(ranked)
    lines = []
    if any(trial.tied for trial in ranked):
        lines.append("★ best adapter   ≈ cannot be told from it: the difference is within noise")
    hidden = len(ranked) - len(_shown(ranked, max_rows)) if max_rows is not None else 0
    if hidden:
        lines.append(f"{hidden} more in {info.output_dir / 'results.csv'}")
    if best is not None and any(trial.is_base and _value(trial) is not None for trial in ranked[: ranked.index(best)]):
        lines.append("No adapter scores better than the base model without one.")
    if info.tokens_per_second is not None:
        lines.append(
            f"{count(info.tokens)} tokens trained in {duration(info.train_seconds)}: "
            f"{count(info.tokens_per_second)} tokens/s over all adapters, {duration(info.total_seconds)} in all"
        )
    return lines + [f"{heading}: {text}" for heading, text in info.details.items()]


def _table(ranked: Sequence[TrialSummary], info: SweepInfo, max_rows: int) -> Table:
    best = winner(ranked)
    adapters = [trial for trial in ranked if not trial.is_base]
    settings = varying_settings(trial.settings for trial in adapters)
    other_loss = info.objective != "val_loss"
    tested = any(trial.test_score is not None for trial in ranked)
    table = Table(box=box.SIMPLE_HEAD, title=Text(info.name, style="bold"), title_justify="left", pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("")
    table.add_column("trial", no_wrap=True)
    for name in settings:
        table.add_column(setting_title(name), max_width=24)
    for title in [
        f"{info.objective} {'↑' if info.direction == 'maximize' else '↓'}",
        *["val_loss"] * other_loss,
        *["test"] * tested,
    ]:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("steps", justify="right")
    table.add_column("state")
    places = {trial.name: place for place, trial in enumerate(ranked, start=1)}
    for trial in _shown(ranked, max_rows):
        scores = [score(trial.objective, trial.objective_se)]
        scores += [score(trial.val_loss, trial.val_loss_se)] * other_loss
        scores += [score(trial.test_score, trial.test_score_se)] * tested
        values = [setting_value(trial.settings[name]) if name in trial.settings else "" for name in settings]
        steps = "" if trial.is_base else str(trial.steps)
        cells = [str(places[trial.name]), marker(trial, best), title_of(trial), *values, *scores, steps, _state(trial)]
        table.add_row(*(Text(cell) for cell in cells), style=_style(trial, best))
    return table


def _accuracy_table(accuracies: Sequence[Accuracy]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Predicted and measured", title_justify="left", pad_edge=False)
    for title in ("", "", "predicted", "measured", "difference"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for accuracy in accuracies:
        for place, figure in enumerate(accuracy.figures):
            cells = ("" if place else accuracy.name, figure.what, *figure.shown())
            table.add_row(*cells, style="yellow" if figure.is_off else "dim")
    return table


def _shown(ranked: Sequence[TrialSummary], max_rows: int | None) -> list[TrialSummary]:
    limit = len(ranked) if max_rows is None else max_rows
    return [trial for place, trial in enumerate(ranked) if place < limit or trial.is_base or trial.name == DEFAULT]


def _state(trial: TrialSummary) -> str:
    return "no adapter" if trial.is_base else trial.state


def _style(trial: TrialSummary, best: TrialSummary | None) -> str:
    if best is not None and trial.name == best.name:
        return "bold green"
    if trial.state != "complete":
        return "red"
    return "cyan" if trial.is_base or trial.name == DEFAULT else ""


def _value(trial: TrialSummary) -> float | None:
    return trial.val_loss if trial.objective is None else trial.objective


def _scored(trial: TrialSummary, info: SweepInfo, named: bool = True) -> str:
    if trial.objective is None:
        return f"val_loss {score(trial.val_loss, trial.val_loss_se)}"
    shown = score(trial.objective, trial.objective_se)
    return f"{info.objective} {shown}" if named else shown
