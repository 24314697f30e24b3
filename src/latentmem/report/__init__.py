"""How runs and comparisons are shown to people: one page, tables for a terminal and in Markdown, and sentences.

It reads files only: nothing here asks a model or a bank.
"""

from latentmem.report.page import write_report
from latentmem.report.tables import format_markdown, format_table
from latentmem.report.verdict import verdict

__all__ = ["format_markdown", "format_table", "verdict", "write_report"]
