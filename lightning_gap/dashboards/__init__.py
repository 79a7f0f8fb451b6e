"""Reports that people read: tables and self-contained HTML pages."""

from lightning_gap.dashboards.report import Fact, Figure, Gallery, Legend, Report, Section, render_html
from lightning_gap.dashboards.table import Column, ResultTable, Row

__all__ = ["Column", "Fact", "Figure", "Gallery", "Legend", "Report", "ResultTable", "Row", "Section", "render_html"]
