"""What several runs say beside each other: runs in, a report out, one section a file."""

from lightning_gap.dashboards.comparison.compare import compare
from lightning_gap.dashboards.comparison.names import better, result_metrics
from lightning_gap.dashboards.comparison.results import results_table

__all__ = ["better", "compare", "result_metrics", "results_table"]
