"""The report of the reproduction: one page, a set of figures, and the data behind them, from a record."""

from __future__ import annotations

from .writing import markdown_tables, write_report

__all__ = ["markdown_tables", "write_report"]
