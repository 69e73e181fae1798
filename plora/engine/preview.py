"""What a sweep would do, on the devices here or on others, shown before anything is loaded."""

from __future__ import annotations

import logging

from rich.console import Console

from plora.checkpoint.atomic import write_text
from plora.checkpoint.layout import SweepLayout
from plora.planner import Plan
from plora.planner.preview import render, to_html

log = logging.getLogger(__name__)

_FILE_WIDTH = 120


def show_preview(plan: Plan, layout: SweepLayout) -> None:
    """Print the plan, and write its page and, to be fed back as ``plan:``, its file."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(render(plan, console.width))
    write_text(layout.plan_page, to_html(plan))
    write_text(layout.plan, plan.to_json())
    log.info("the plan as a page: %s; to feed it back: plan=%s", layout.plan_page, layout.plan)
