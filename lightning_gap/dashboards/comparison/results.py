"""The section of the metrics that users log themselves."""

from collections.abc import Sequence

from lightning_gap.dashboards.comparison.compared import MOST_COLUMNS, Compared, as_float, count
from lightning_gap.dashboards.comparison.names import HELD_OUT, REGIME, TRAINING, better, result_metrics, short
from lightning_gap.dashboards.report import Gallery, Legend, Section
from lightning_gap.dashboards.runs import Run
from lightning_gap.dashboards.table import ResultTable

__all__ = ["batch", "results_section", "results_table"]

_MOST_CURVES = 8


def results_section(compared: Compared) -> Section | None:
    """Return the section, if any run has such a metric."""
    metrics = result_metrics(compared.runs)
    compared = compared.where(lambda run: any(key in run.metrics for key in metrics))
    if not metrics:
        return None
    shown = [key for key in metrics if HELD_OUT.search(key)][:MOST_COLUMNS] or metrics[:MOST_COLUMNS]
    shown += [key for key in metrics if TRAINING.search(key) and key not in shown][: MOST_COLUMNS - len(shown)]
    marked = [key for key in shown if better(key)]
    lead = f"{count(len(compared.runs), 'run')}, {count(len(metrics), 'metric')} of their own."
    if marked and len(compared.runs) > 1:
        winner, value = compared.best(marked[0])
        lead += f" By {short(marked[0])}, {winner.name} ends best, at {value:.4g}."
    blocks: list[ResultTable | Gallery | Legend] = [_table(compared, shown)]
    return Section("Results", lead, blocks + compared.with_legend(compared.curves(metrics[:_MOST_CURVES])))


def results_table(runs: Sequence[Run], metrics: Sequence[str]) -> ResultTable:
    """Return the last values of some metrics, run by run, the best marked.

    Args:
        runs: The runs.
        metrics: The keys of the metrics.
    """
    return _table(Compared(runs, {}), metrics)


def _table(compared: Compared, metrics: Sequence[str]) -> ResultTable:
    unmarked = [short(key) for key in metrics if better(key) is None]
    caption = "The last value of each metric; the best of each column is marked."
    if unmarked:
        caption += f" Whether more is better the name does not tell of {', '.join(unmarked)}."
    return compared.table(
        "Results",
        {
            "Batch": [batch(run) for run in compared.runs],
            "Updates": [run.updates for run in compared.runs],
            **{short(key): (compared.last(key), better(key)) for key in metrics},
        },
        caption,
    )


def batch(run: Run) -> float | None:
    """Return a run's samples per update, as far as it tells."""
    return as_float(run.config.get(f"{REGIME}batch_size", run.config.get("batch_size")))
