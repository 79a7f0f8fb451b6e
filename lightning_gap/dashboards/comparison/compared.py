"""Runs beside each other: their tables, curves and pictures, in which each keeps its colour."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_gap.dashboards import figures
from lightning_gap.dashboards.report import Figure, Gallery, Legend
from lightning_gap.dashboards.runs import Run
from lightning_gap.dashboards.table import Column, ResultTable, Row

__all__ = [
    "DIFFUSION",
    "HELD_OUT",
    "MONGE",
    "MOST_COLUMNS",
    "REGIME",
    "TRAINING",
    "Compared",
    "as_float",
    "better",
    "count",
    "curve",
    "result_metrics",
    "short",
]

MOST_COLUMNS = 6
_MOST_POINTS = 400


@dataclass(frozen=True)
class Compared:
    """Some of the runs, in order, and the number of each one's colour and dashes, the same in all figures."""

    runs: Sequence[Run]
    numbers: Mapping[str, int]

    def where(self, kept: Callable[[Run], bool]) -> "Compared":
        """Return the runs for which a function is true."""
        return replace(self, runs=[run for run in self.runs if kept(run)])

    @property
    def styles(self) -> list[int]:
        """The numbers of the runs."""
        return [self.numbers[run.name] for run in self.runs]

    def last(self, key: str) -> list[float | None]:
        """Return the last value of a metric, run by run."""
        return [run.last(key) for run in self.runs]

    def given(self, key: str) -> list[Any]:
        """Return a hyper-parameter, run by run."""
        return [run.config.get(key) for run in self.runs]

    def best(self, key: str) -> tuple[Run, float]:
        """Return the run that ends best by a metric, and where."""
        known = [(run, value) for run in self.runs if (value := run.last(key)) is not None]
        return (max if better(key) == "max" else min)(known, key=lambda each: each[1])

    def table(self, title: str, columns: Mapping[str, Sequence[Any] | tuple[Sequence[Any], Any]], caption: str
              ) -> ResultTable:  # fmt: skip
        """Return a table of one row a run: of values by column, or these and which is the best. Empty columns go."""
        pairs = {name: each if isinstance(each, tuple) else (each, None) for name, each in columns.items()}
        shown = {name: each for name, each in pairs.items() if any(value is not None for value in each[0])}
        heads = [
            Column(name) if any(isinstance(value, str) for value in values) else _column(name, values, best)
            for name, (values, best) in shown.items()
        ]
        rows = [
            Row(run.name, ["–" if values[i] is None else values[i] for values, _ in shown.values()], run.kind)
            for i, run in enumerate(self.runs)
        ]
        return ResultTable(title, "Run", heads, rows, caption)

    def curves(self, keys: Sequence[str], *, logx: bool = False, logy: bool = False) -> list[Figure]:
        """Return a figure for each metric of which runs have more than a value each: the others are in tables."""
        drawn = []
        for key in keys:
            lines = [curve(run, key) for run in self.runs]
            if sum(len(line.x) for line in lines) <= sum(len(line.x) > 0 for line in lines):
                continue
            figure = figures.overlay(
                lines, self.styles, xlabel="updates", ylabel=short(key), logx=logx, logy=logy, floor_quantile=0.02
            )
            ends = ", ".join(f"{line.label} {line.y[-1]:.4g}" for line in lines if len(line.y))
            drawn.append(Figure(figures.as_svg(figure), "", f"{key} against updates; last values: {ends}", short(key)))
        return drawn

    def pictures(self, keys: Sequence[str]) -> list[Figure]:
        """Return the pictures under some keys, run by run."""
        return [
            Figure(run.pictures[key], "", f"{key} of {run.name}", f"{run.name} · {short(key)}")
            for run in self.runs
            for key in keys
            if key in run.pictures
        ]

    def legend(self) -> Legend:
        """Return the legend of all figures."""
        return Legend("Runs", [run.name for run in self.runs], self.styles)

    def with_legend(self, gallery: Sequence[Figure]) -> list[ResultTable | Gallery | Legend]:
        """Return figures under their legend, nothing where there are none."""
        return [self.legend(), Gallery(gallery, 2 if len(gallery) > 1 else 1)] if gallery else []


def curve(run: Run, key: str) -> figures.Curve:
    """Return a metric as a line of at most 400 points, the first and the last among them, and means between."""
    series = run.metrics.get(key, np.zeros((0, 2)))
    series = _thinned(series[np.isfinite(series).all(1)])
    return figures.Curve(run.name, series[:, 0], series[:, 1], figures.INK)


def _thinned(series: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(series) <= _MOST_POINTS:
        return series
    parts = np.array_split(series[1:-1], _MOST_POINTS - 2)
    return np.concatenate([series[:1], [part.mean(0) for part in parts], series[-1:]])


def _column(name: str, values: Sequence[float | None], best: Literal["max", "min"] | None) -> Column:
    known = [value for value in values if value is not None]
    whole = all(float(value).is_integer() for value in known)
    return Column(name, 0 if whole and best is None else _digits(known), best if len(known) > 1 else None)


def _digits(values: Sequence[float]) -> int:
    """Return how many decimals show four digits of the largest of some values."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=1.0)
    return 4 if largest == 0 else min(max(3 - math.floor(math.log10(largest)), 0), 6)


def as_float(value: Any) -> float | None:
    """Return a number as such, nothing for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def count(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


REGIME, DIFFUSION, MONGE = (f"lightning_gap/{room}/" for room in ("regime", "diffusion", "monge"))
HELD_OUT = re.compile(r"(?:^|[_/.-])(?:val|valid|validation|test|eval)(?:[_/.-]|$)|^(?:val|test)")
TRAINING = re.compile(r"(^|[_/.-])train(ing)?([_/.-]|$)")
# Words in the names of metrics, and whether more of it is better.
_MORE = re.compile(r"acc|auc|auroc|f1|precision|recall|r2|cosine|iou|dice|bleu|score|correlation")
_LESS = re.compile(r"loss|error|err\b|rmse|mse|mae|nll|perplexity|divergence|gap|distance|wasserstein|unexplained|fid")
# What is logged beside the metrics.
_BESIDE = re.compile(r"^(epoch|hp_metric|lr-.*|step)$")


def better(metric: str) -> Literal["max", "min"] | None:
    """Return whether more or less of a metric is better, by the words in its name; None where these do not tell.

    Args:
        metric: The key it is logged under.

    Example:
        >>> better("val_accuracy"), better("lightning_gap/monge/val_monge_gap"), better("val_temperature")
        ('max', 'min', None)
    """
    name = metric.rpartition("/")[2].lower()
    return "max" if _MORE.search(name) else "min" if _LESS.search(name) else None


def result_metrics(runs: Sequence[Run]) -> list[str]:
    """Return the metrics of the users' own modules: those on held-out data first, and then those with a best.

    Args:
        runs: The runs.
    """
    keys = {key for run in runs for key in run.metrics}
    own = [key for key in keys if not key.startswith("lightning_gap/") and not _BESIDE.match(key)]
    return sorted(own, key=lambda key: (not HELD_OUT.search(key), better(key) is None, better(key) != "max", key))


def short(key: str) -> str:
    """Return a key without the package's prefix."""
    return re.sub(r"^lightning_gap/\w+/", "", key)
