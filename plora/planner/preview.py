"""A plan to look at before spending a GPU-hour: a table, a Gantt chart in the terminal, and one as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from plora.planner.baselines import BEST, WORST
from plora.planner.plan import Plan, PlannedJob
from plora.profiler.memory import GIB

# Colours that keep apart in a terminal and on paper, by job number.
TERMINAL_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")
HTML_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#9c755f", "#edc948")
# Above this many the trials are left to the page.
MOST_TRIALS = 24
_REASONS = {
    "work": "all devices busy with useful work from start to end",
    "longest": "the longest trial alone",
    "memory": "rounds that the memory forces",
    "rounds": "useful work, and rounds that trials of many steps force",
    "whole": "trials cannot be divided among devices",
}


def render(plan: Plan, width: int = 100) -> RenderableType:
    """The whole preview for a rich console: table of jobs, Gantt charts of devices and of trials, totals."""
    charts = [gantt(plan, width)]
    if sum(len(job.trials) for job in plan.jobs) <= MOST_TRIALS:
        charts.append(trial_gantt(plan, width))
    return Group(table(plan), *(part for chart in charts for part in (Text(), chart)), Text(), Text(summary(plan)))


def as_text(plan: Plan, width: int = 120) -> str:
    """The preview as plain text, for logs and files."""
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as capture:
        console.print(render(plan, width))
    return capture.get()


def table(plan: Plan) -> Table:
    """One row per job."""
    view = Table(title=f"Plan for {plan.model} on {plan.n_devices} x {plan.device}", title_justify="left")
    for heading in (
        "job",
        "GPUs",
        "degree",
        "trials",
        "rank sum",
        "tokens/step",
        "memory of free",
        "start",
        "duration",
    ):
        view.add_column(heading, justify="left" if heading in ("GPUs", "trials") else "right")
    for job in plan.jobs:
        view.add_row(
            str(job.number),
            device_range(job.devices),
            str(job.degree),
            _trial_names(job),
            str(sum(trial.rank for trial in job.trials)),
            f"{job.tokens_per_step:,.0f}",
            f"{_memory(job, plan)} ({job.memory_bytes / plan.free_bytes:.0%})",
            duration(job.start),
            duration(job.seconds),
        )
    return view


def gantt(plan: Plan, width: int = 100) -> Text:
    """A line per device: which job runs when; small gaps between a job's end and the next start are idle."""
    columns = max(20, width - 14)
    chart = Text()
    devices = range(plan.n_devices)
    for device in devices:
        line = Text(f"GPU {device:<4d}|" if plan.device != "cpu" else "CPU     |")
        cells: list[tuple[str, str]] = [(" ", "")] * columns
        for job in plan.jobs:
            if device in job.devices:
                first, last = (round(x / plan.makespan * columns) for x in (job.start, job.end))
                room = max(1, last - first - 1)
                number = str(job.number) if len(str(job.number)) <= room else ""  # its first digits are another job's
                label = number.center(room, "█") + "▌"  # a seam to the next job
                for place, character in zip(range(first, last), label, strict=False):
                    cells[place] = (character, TERMINAL_COLOURS[job.number % len(TERMINAL_COLOURS)])
        for character, style in cells:
            line.append(character, style=style or None)
        chart.append(line.append("|\n"))
    chart.append(f"{'':9s}0{duration(plan.makespan):>{columns - 1}s}")
    return chart


def trial_gantt(plan: Plan, width: int = 100) -> Text:
    """A line per trial: the rounds of its job that it takes part in, at even width."""
    chart = Text()
    names = max(len(trial.name) for job in plan.jobs for trial in job.trials)
    columns = max(20, width - names - 22)
    for job in plan.jobs:
        chart.append(f"Rounds of job {job.number}: 0 to {job.rounds}\n")
        for trial in job.trials:
            first, last = (round(x / job.rounds * columns) for x in (trial.start_round, trial.end_round))
            bar = "█" * max(1, last - first)
            chart.append(f"{trial.name:{names}} |{' ' * min(first, columns - 1)}")
            chart.append(bar, style=TERMINAL_COLOURS[job.number % len(TERMINAL_COLOURS)])
            rest = " " * max(0, columns - first - len(bar))
            chart.append(f"{rest}| {trial.tokens_per_step:,.0f} tokens/step\n")
    chart.rstrip()
    return chart


def summary(plan: Plan) -> str:
    """Totals, the gap to the lower bound, and the predicted savings, in sentences."""
    trials = sum(len(job.trials) for job in plan.jobs)
    busy = sum(job.degree * job.seconds for job in plan.jobs) / (plan.n_devices * plan.makespan)
    lines = [
        f"{counted(trials, 'trial')} in {counted(len(plan.jobs), 'job')} end{'s' * (trials == 1)} after "
        f"{duration(plan.makespan)}"
        f"{' (times estimated from data sheets)' if plan.estimated else ''}; devices are busy {busy:.0%} of it.",
        f"No plan can end before {duration(plan.lower_bound)} ({_REASONS[plan.bound_reason]}): "
        f"the gap is {plan.gap:.1%}.",
    ]
    for name, what in ((WORST, "one adapter at a time with eager peft"), (BEST, "the best one-at-a-time training")):
        if name in plan.baselines:
            other = plan.baselines[name]
            saved = other - plan.makespan
            gain = f"saves {duration(saved)}" if saved >= 0 else f"takes {duration(-saved)} longer"
            lines.append(f"Against {what} ({duration(other)}) it {gain}: {other / plan.makespan:.2f}x.")
    return "\n".join(lines)


def to_html(plan: Plan) -> str:
    """A page of its own: table, Gantt chart with each trial's rounds inside its job, and the totals. No scripts."""
    rows = "".join(
        f"<tr><td>{job.number}</td><td>{device_range(job.devices)}</td><td>{job.degree}</td>"
        f"<td>{len(job.trials)}</td><td>{job.tokens_per_step:,.0f}</td>"
        f"<td>{_memory(job, plan)}</td>"
        f"<td>{duration(job.start)}</td><td>{duration(job.seconds)}</td></tr>"
        for job in plan.jobs
    )
    headings = "".join(
        f"<th>{heading}</th>"
        for heading in ("job", "GPUs", "degree", "trials", "tokens/step", "memory of free", "start", "duration")
    )
    totals = "<br>".join(html.escape(line) for line in summary(plan).splitlines())
    title = html.escape(f"Plan for {plan.model} on {plan.n_devices} x {plan.device}")
    return (
        f"<!doctype html><html><head><meta charset='utf-8'><title>{title}</title><style>"
        "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right}"
        "th{border-bottom:1px solid}svg text{font:10px sans-serif}</style></head><body>"
        f"<h1>{title}</h1><p>{totals}</p>{svg(plan)}<table><tr>{headings}</tr>{rows}</table></body></html>\n"
    )


def svg(plan: Plan, width: int = 1000) -> str:
    """The Gantt chart as SVG: a row per device, a box per job, a line per trial over the rounds it takes part in.

    Rounds of a job are drawn at even width; hovering a line names its trial.
    """
    row, left = 44, 60
    scale = (width - left) / plan.makespan
    parts = []
    for device in range(plan.n_devices):
        name = "CPU" if plan.device == "cpu" else f"GPU {device}"
        parts.append(f"<text x='0' y='{device * row + row / 2:.0f}'>{name}</text>")
    for job in plan.jobs:
        colour = HTML_COLOURS[job.number % len(HTML_COLOURS)]
        x, y = left + job.start * scale, min(job.devices) * row
        box, high = job.seconds * scale, len(job.devices) * row - 4
        parts.append(
            f"<rect x='{x:.1f}' y='{y}' width='{box:.1f}' height='{high}' fill='{colour}' fill-opacity='.25' "
            f"stroke='{colour}'><title>job {job.number}: {duration(job.start)} to {duration(job.end)}</title></rect>"
        )
        step = high / (len(job.trials) + 1)
        for place, trial in enumerate(job.trials):
            a = x + box * trial.start_round / job.rounds
            b = x + box * trial.end_round / job.rounds
            what = f"{html.escape(trial.name)}: rank {trial.rank}, {trial.steps} steps from round {trial.start_round}"
            parts.append(
                f"<line x1='{a:.1f}' x2='{b:.1f}' y1='{y + (place + 1) * step:.1f}' y2='{y + (place + 1) * step:.1f}' "
                f"stroke='{colour}' stroke-width='{max(0.6, min(4.0, step * 0.7)):.1f}'>"
                f"<title>{what}</title></line>"
            )
    height = plan.n_devices * row + 20
    parts.append(f"<text x='{left}' y='{height - 4}'>0</text>")
    parts.append(f"<text x='{width}' y='{height - 4}' text-anchor='end'>{duration(plan.makespan)}</text>")
    return f"<svg width='{width}' height='{height}' xmlns='http://www.w3.org/2000/svg'>{''.join(parts)}</svg>"


def device_range(devices: Sequence[int]) -> str:
    """``0-3`` for consecutive devices, ``0,2`` for others."""
    if len(devices) > 1 and list(devices) == list(range(devices[0], devices[0] + len(devices))):
        return f"{devices[0]}-{devices[-1]}"
    return ",".join(map(str, devices))


def duration(seconds: float) -> str:
    """``45s``, ``12m 30s``, ``3h 07m``."""
    if seconds < 10:
        return f"{seconds:.1f}s" if seconds else "0s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def counted(number: int, what: str) -> str:
    """``1 job``, ``2 jobs``."""
    return f"{number} {what}{'s' * (number != 1)}"


def _memory(job: PlannedJob, plan: Plan) -> str:
    return f"{job.memory_bytes / GIB:.1f} of {plan.free_bytes / GIB:.1f} GiB"


def _trial_names(job: PlannedJob, most: int = 3) -> str:
    names = [trial.name for trial in job.trials]
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{len(names)}: {shown}, ..."
