"""Hypothesis tries the same examples in every run: a red test is about the change, not about luck."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
