"""The report of a run: one static folder with a page and its images."""

from headwise.report.charts import heat_map
from headwise.report.page import write_report

__all__ = ["heat_map", "write_report"]
