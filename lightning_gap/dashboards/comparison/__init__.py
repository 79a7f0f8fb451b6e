"""What several runs say beside each other: runs in, a report out, section by section."""

from lightning_gap.dashboards.comparison.compare import compare, results_table
from lightning_gap.dashboards.comparison.compared import better, result_metrics

__all__ = ["better", "compare", "result_metrics", "results_table"]
