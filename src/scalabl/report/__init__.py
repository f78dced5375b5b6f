"""What a comparison looks like: the rows of figures, the terminal table, and one self-contained HTML file."""

from scalabl.report.render import write
from scalabl.report.results import MethodResult, Report
from scalabl.report.table import table
from scalabl.report.terminal import print_table

__all__ = ["MethodResult", "Report", "print_table", "table", "write"]
