"""What runs and comparisons look like to people: one page, tables for a terminal and in Markdown, and words.

Files are the whole interface: nothing here asks a model or a bank.
"""

from latentmem.report.page import write_report
from latentmem.report.tables import format_markdown, format_table
from latentmem.report.verdict import verdict

__all__ = ["format_markdown", "format_table", "verdict", "write_report"]
