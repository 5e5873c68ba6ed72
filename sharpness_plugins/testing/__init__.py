"""Conformance suites: what our own plugins pass, and third parties run in their tests, one line each."""

from __future__ import annotations

from .core import ConformanceError, ConformanceReport, Finding, Verdict
from .metrics import check_metric
from .schedules import check_schedule

__all__ = ["ConformanceError", "ConformanceReport", "Finding", "Verdict", "check_metric", "check_schedule"]
