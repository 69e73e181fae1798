"""``report.html``: the ranking, the losses and what each setting did, in one page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plora.checkpoint.atomic import write_text
from plora.report.accuracy import Accuracy
from plora.report.info import SweepInfo
from plora.report.leaderboard import marker, notes, snippets, verdict
from plora.report.metrics_file import Curve
from plora.report.results import DEFAULT, TrialSummary, is_number, title_of, varying_settings, winner
from plora.report.style import CSS
from plora.report.svg import (
    Axis,
    Line,
    Point,
    category_axis,
    nice_categories,
    number_axis,
    plot,
    sparkline,
    thin,
)
from plora.report.text import count, duration, score, setting_title, setting_value, settings_line

_CURVE_POINTS = 120
_WHISKER_WIDTH = 110
_WHISKER_HEIGHT = 18


def write_report(
    path: str | Path, ranked: Sequence[TrialSummary], info: SweepInfo, curves: Mapping[str, Curve]
) -> None:
    """Writes the page, atomically.

    Args:
        path: where to.
        ranked: the trials and the base model, as ``leaderboard`` orders them.
        info: the sweep.
        curves: losses by trial name (see ``read_curve``); the base model's under ``base``.
    """
    write_text(path, render_report(ranked, info, curves))


def render_report(ranked: Sequence[TrialSummary], info: SweepInfo, curves: Mapping[str, Curve]) -> str:
    """The page as text; see ``write_report``."""
    sections = [
        _header(ranked, info),
        _section("Ranking", _ranking(ranked, info) + _notes(ranked, info)),
        _section("What the settings did", _scatters(ranked, info)),
        _section("Validation loss of all trials", _overview(ranked, curves)),
        _section("Loss of each trial", _small_multiples(ranked, curves)),
        _section("Predicted and measured", _accuracy(info.accuracies)),
        _section("Use the best adapter", _use(ranked, info)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info.name)} · plora</title><style>{CSS}</style></head>\n"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def ranking_table(ranked: Sequence[TrialSummary], info: SweepInfo) -> str:
    """The ranking as an HTML table; its looks come from the page."""
    best = winner(ranked)
    settings = varying_settings(trial.settings for trial in ranked if not trial.is_base)
    other_loss = info.objective != "val_loss"
    tested = any(trial.test_score is not None for trial in ranked)
    axis = _score_axis(ranked)
    titles = ["#", "trial", *map(setting_title, settings), info.objective, ""]
    titles += ["val_loss"] * other_loss + ["test"] * tested + ["steps", "tokens"]
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    rows = []
    for place, trial in enumerate(ranked, start=1):
        cells = [str(place), _name_cell(trial, best)]
        cells += [escape(setting_value(trial.settings[n])) if n in trial.settings else "" for n in settings]
        cells += [escape(score(trial.objective, trial.objective_se)), _whisker(trial, axis)]
        cells += [escape(score(trial.val_loss, trial.val_loss_se))] * other_loss
        cells += [escape(score(trial.test_score, trial.test_score_se))] * tested
        cells += ["", ""] if trial.is_base else [str(trial.steps), count(trial.tokens)]
        rows.append(f'<tr class="{_row_class(trial, best)}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _header(ranked: Sequence[TrialSummary], info: SweepInfo) -> str:
    best = winner(ranked)
    said = verdict(ranked, info) if best else "No trial completed, so there is no best adapter."
    trials = [trial for trial in ranked if not trial.is_base]
    unfinished = sum(trial.state != "complete" for trial in trials)
    tiles = [
        ("best adapter", best.name if best else "–"),
        (info.objective, score(best.objective, best.objective_se) if best else "–"),
        ("trials", f"{len(trials)}" + (f" ({unfinished} not complete)" if unfinished else "")),
        ("tokens/s", count(info.tokens_per_second)),
        ("total time", duration(info.total_seconds)),
    ]
    shown = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(title)}</span></div>" for title, value in tiles
    )
    base = escape(info.base_name + (f" @ {info.base_revision[:12]}" if info.base_revision else ""))
    return (
        f"<header><h1>{escape(info.name)}</h1><p class=sub>LoRA sweep over {base}, {escape(info.objective)}: "
        f"{info.better} is better</p><p class=verdict>{escape(said)}</p><div class=tiles>{shown}</div></header>"
    )


def _ranking(ranked: Sequence[TrialSummary], info: SweepInfo) -> str:
    return f"<div class=scroll>{ranking_table(ranked, info)}</div>"


def _notes(ranked: Sequence[TrialSummary], info: SweepInfo) -> str:
    lines = notes(ranked, info)
    lines += [f"{trial.name} {trial.state}: {trial.error}" for trial in ranked if trial.error]
    return "<ul class=notes>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _name_cell(trial: TrialSummary, best: TrialSummary | None) -> str:
    mark = marker(trial, best)
    badges = [("tied", trial.tied), (trial.state, trial.state != "complete")]
    shown = "".join(f'<span class="badge {text}">{escape(text)}</span>' for text, wanted in badges if wanted)
    return f"<b>{escape(title_of(trial))}</b>{' ' + mark if mark else ''}{shown}"


def _row_class(trial: TrialSummary, best: TrialSummary | None) -> str:
    if best is not None and trial.name == best.name:
        return "best"
    if trial.state != "complete":
        return "bad"
    return "reference" if trial.is_base or trial.name == DEFAULT else ""


def _score_axis(ranked: Sequence[TrialSummary]) -> Axis | None:
    """A scale that holds the scores of all complete trials."""
    ends = [
        float(trial.objective or 0.0) + sign * (trial.objective_se or 0.0)
        for trial in ranked
        if trial.state == "complete" and is_number(trial.objective)
        for sign in (-1, 1)
    ]
    return number_axis(ends, log=False) if ends else None


def _whisker(trial: TrialSummary, axis: Axis | None) -> str:
    """The score as a dot with its standard error, on the scale that all rows share."""
    if axis is None or trial.objective is None or not 0 <= axis.place(trial.objective) <= 1:
        return ""
    x, y = axis.place(trial.objective) * _WHISKER_WIDTH, _WHISKER_HEIGHT / 2
    half = (trial.objective_se or 0.0) / (axis.high - axis.low) * _WHISKER_WIDTH
    return (
        f'<svg class=whisker width="{_WHISKER_WIDTH}" height="{_WHISKER_HEIGHT}" aria-hidden="true">'
        f'<line x1="{x - half:.1f}" x2="{x + half:.1f}" y1="{y}" y2="{y}"/>'
        f'<circle cx="{x:.1f}" cy="{y}" r="3.5"/></svg>'
    )


def _scatters(ranked: Sequence[TrialSummary], info: SweepInfo) -> str:
    """One plot for each setting in which trials differ."""
    trials = [trial for trial in ranked if not trial.is_base and trial.state == "complete"]
    scored_by = [trial for trial in trials if is_number(trial.objective)]
    # Where only the best few have the objective, the validation loss says more about a setting.
    by_loss = len(scored_by) < max(3, len(trials) // 2)
    label = "val_loss" if by_loss else info.objective
    values = [(trial, *_score_of(trial, by_loss)) for trial in trials]
    shown = [(trial, y, error) for trial, y, error in values if is_number(y)]
    if not shown:
        return ""
    y_axis = number_axis([float(y) for _, y, _ in shown], label)
    best = winner(ranked)
    plots = []
    for name in varying_settings(trial.settings for trial in trials):
        x_axis, places = _setting_axis(name, [trial.settings.get(name) for trial, _, _ in shown])
        points = [
            Point(
                place,
                float(y or 0.0),
                "dot best" if trial is best else ("dot tied" if trial.tied else "dot"),
                f"{trial.name}: {setting_title(name)} {setting_value(trial.settings.get(name))}, {score(y, error)}",
                error,
            )
            for place, (trial, y, error) in zip(places, shown, strict=True)
        ]
        plots.append(f"<figure>{plot(x_axis, y_axis, points=points[::-1])}</figure>")  # the best on top
    return f"<div class=plots>{''.join(plots)}</div>" if plots else ""


def _score_of(trial: TrialSummary, by_loss: bool) -> tuple[float | None, float | None]:
    return (trial.val_loss, trial.val_loss_se) if by_loss else (trial.objective, trial.objective_se)


def _setting_axis(name: str, values: Sequence[Any]) -> tuple[Axis, list[float]]:
    """An axis for a setting's values and where each lies on it: numbers where there are many, else categories."""
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) == len(values) and len(set(numbers)) > 5:
        return number_axis(numbers, setting_title(name)), numbers
    texts = [setting_value(value) for value in nice_categories([_hashable(value) for value in values])]
    return category_axis(texts, setting_title(name)), [float(texts.index(setting_value(value))) for value in values]


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) or value is None else setting_value(value)


def _overview(ranked: Sequence[TrialSummary], curves: Mapping[str, Curve]) -> str:
    """All validation losses over the part of the training done, the winner's and the default's standing out."""
    best = winner(ranked)
    lines = []
    for trial in reversed(ranked):
        points = _by_part(curves.get(trial.name, Curve()).val)
        css = "line best" if trial is best else ("line default" if trial.name == DEFAULT else "line")
        if not trial.is_base:
            lines.append(Line(points, css, f"{trial.name}: {score(trial.val_loss)}", dots=len(points) < 20))
    lines.sort(key=lambda line: line.css != "line")  # those that stand out are drawn last
    bases = [(title_of(trial), trial.val_loss) for trial in ranked if trial.is_base and is_number(trial.val_loss)]
    values = [y for line in lines for _, y in line.points if math.isfinite(y)]
    if not values:
        return ""
    lines = [Line([(0, loss), (100, loss)], "line base", f"{title}: {score(loss)}") for title, loss in bases] + lines
    shown = _without_outliers(values)
    # The base model's loss is the thing to beat, unless it is so far off that it would flatten the rest.
    near = [loss for _, loss in bases if loss <= max(shown) + 2 * (max(shown) - min(shown))]
    y_axis = number_axis(shown + near, "val_loss", log=False)
    key = [("best", "best adapter"), ("default", "default"), ("", "others")]
    key += [("base", f"{title}, {score(loss)}") for title, loss in bases]
    legend = "".join(f'<span class="key {css}">{text}</span>' for css, text in key)
    drawn = plot(Axis(-2, 102, label="% of the trial's own training"), y_axis, lines, width=1100, height=340)
    return f"<figure class=wide>{drawn}<figcaption>{legend}</figcaption></figure>"


def _small_multiples(ranked: Sequence[TrialSummary], curves: Mapping[str, Curve]) -> str:
    """Training and validation loss of each trial, all on one scale."""
    found = {trial.name: curves[trial.name] for trial in ranked if not trial.is_base and trial.name in curves}
    train = {name: thin(curve.train, _CURVE_POINTS) for name, curve in found.items()}
    values = [y for points in train.values() for _, y in points]
    values += [y for curve in found.values() for _, y in curve.val if math.isfinite(y)]
    if not values:
        return ""
    y_axis = number_axis(_without_outliers(values), log=False)
    settings = varying_settings(trial.settings for trial in ranked if not trial.is_base)
    best = winner(ranked)
    cards = []
    for trial in ranked:
        if trial.name not in found:
            continue
        steps = [step for step, _ in (*found[trial.name].train, *found[trial.name].val)] or [1]
        lines = [Line(train[trial.name], "line train"), Line(found[trial.name].val, "line val", dots=True)]
        drawn = sparkline(Axis(0, max(steps) or 1), y_axis, lines)
        cards.append(
            f'<figure class="card {_row_class(trial, best)}"><figcaption>{_name_cell(trial, best)}'
            f"<span>{escape(settings_line(trial.settings, settings))}</span></figcaption>{drawn}"
            f"<span>val_loss {escape(score(trial.val_loss))} after {trial.steps} steps</span></figure>"
        )
    low, high = score(y_axis.low, digits=2), score(y_axis.high, digits=2)
    legend = '<p class=legend><span class="key train">training</span><span class="key val">validation</span>'
    legend += f"all on one scale, from {low} to {high}</p>"
    return f"{legend}<div class=cards>{''.join(cards)}</div>"


def _accuracy(accuracies: Sequence[Accuracy]) -> str:
    """Each job's and the sweep's predictions beside what was measured; those far off stand out."""
    rows = []
    for accuracy in accuracies:
        for place, figure in enumerate(accuracy.figures):
            cells = ("" if place else accuracy.name, figure.what, *figure.shown())
            css = ' class="bad"' if figure.is_off else ""
            rows.append(f"<tr{css}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    if not rows:
        return ""
    head = "".join(f"<th>{title}</th>" for title in ("", "", "predicted", "measured", "difference"))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div class=scroll>{table}</div>"


def _by_part(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    last = max((step for step, _ in points), default=0) or 1
    return [(100 * step / last, loss) for step, loss in points]


def _without_outliers(values: Sequence[float]) -> list[float]:
    """Values without the largest fiftieth, so that one spike doesn't flatten everything else."""
    ordered = sorted(values)
    return ordered[: max(1, math.ceil(0.98 * len(ordered)))]


def _use(ranked: Sequence[TrialSummary], info: SweepInfo) -> str:
    best = winner(ranked)
    if best is None:
        return ""
    found = snippets(best, info).items()
    return "".join(f"<h3>{escape(title)}</h3><pre>{escape(snippet)}</pre>" for title, snippet in found)
