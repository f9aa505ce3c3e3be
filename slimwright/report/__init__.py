"""The report as a page and as a table for the terminal; both are made from the contents of ``report.json``."""

from slimwright.report.page import render_report
from slimwright.report.terminal import terminal_table

__all__ = ["render_report", "terminal_table"]
