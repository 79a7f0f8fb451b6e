"""What several runs say beside each other: runs in, a report out."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_gap.dashboards import figures
from lightning_gap.dashboards.report import Fact, Figure, Gallery, Legend, Report, Section
from lightning_gap.dashboards.runs import Run
from lightning_gap.dashboards.table import Column, ResultTable, Row

__all__ = ["better", "compare", "result_metrics", "results_table"]

_REGIME, _DIFFUSION, _MONGE = (f"lightning_gap/{room}/" for room in ("regime", "diffusion", "monge"))
# Words in the names of metrics, and whether more of it is better.
_MORE = re.compile(r"acc|auc|auroc|f1|precision|recall|r2|cosine|iou|dice|bleu|score|correlation")
_LESS = re.compile(r"loss|error|err\b|rmse|mse|mae|nll|perplexity|divergence|gap|distance|wasserstein|unexplained|fid")
_HELD_OUT = re.compile(r"(?:^|[_/.-])(?:val|valid|validation|test|eval)(?:[_/.-]|$)|^(?:val|test)")
_TRAINING = re.compile(r"(^|[_/.-])train(ing)?([_/.-]|$)")
# What is logged beside the metrics.
_BESIDE = re.compile(r"^(epoch|hp_metric|lr-.*|step)$")
_MOST_COLUMNS = 6
_MOST_CURVES = 8
_MOST_POINTS = 400
_MONGE_ORDER = (
    "sinkhorn_divergence", "monge_gap", "energy_distance", "wasserstein_1", "unexplained_variance",
    "displacement_cosine", "displacement", "loss",
)  # fmt: skip


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
    return sorted(own, key=lambda key: (not _HELD_OUT.search(key), better(key) is None, better(key) != "max", key))


def _digits(values: Sequence[float]) -> int:
    """Return how many decimals show four digits of the largest of some values."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=1.0)
    return 4 if largest == 0 else min(max(3 - math.floor(math.log10(largest)), 0), 6)


def _column(name: str, values: Sequence[float | None], best: Literal["max", "min"] | None = None) -> Column:
    known = [value for value in values if value is not None]
    whole = all(float(value).is_integer() for value in known)
    return Column(name, 0 if whole and best is None else _digits(known), best if len(known) > 1 else None)


def _table(
    title: str, runs: Sequence[Run], columns: Mapping[str, tuple[Sequence[Any], Any]], caption: str
) -> ResultTable:
    """Return a table of one row a run; columns are named lists of values, each with which of them is the best."""
    shown = {name: each for name, each in columns.items() if any(value is not None for value in each[0])}
    heads = [
        Column(name) if any(isinstance(value, str) for value in values) else _column(name, values, best)
        for name, (values, best) in shown.items()
    ]
    rows = [
        Row(run.name, ["–" if values[i] is None else values[i] for values, _ in shown.values()], run.kind)
        for i, run in enumerate(runs)
    ]
    return ResultTable(title, "Run", heads, rows, caption)


def results_table(runs: Sequence[Run], metrics: Sequence[str]) -> ResultTable:
    """Return the last values of some metrics, run by run, the best marked.

    Args:
        runs: The runs.
        metrics: The keys of the metrics.
    """
    columns: dict[str, tuple[Sequence[Any], Any]] = {
        "Batch": ([_batch(run) for run in runs], None),
        "Updates": ([run.updates for run in runs], None),
    }
    columns |= {_short(key): ([run.last(key) for run in runs], better(key)) for key in metrics}
    unmarked = [_short(key) for key in metrics if better(key) is None]
    caption = "The last value of each metric; the best of each column is marked."
    if unmarked:
        caption += f" Whether more is better the name does not tell of {', '.join(unmarked)}."
    return _table("Results", runs, columns, caption)


def _short(key: str) -> str:
    return re.sub(r"^lightning_gap/\w+/", "", key)


def _batch(run: Run) -> float | None:
    value = run.config.get(f"{_REGIME}batch_size", run.config.get("batch_size"))
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


# ----------------------------------------------------------------- figures

# The number of each run's colour and dashes, the same in all figures.
Styles = Mapping[str, int]


def _of(runs: Sequence[Run], styles: Styles) -> list[int]:
    return [styles[run.name] for run in runs]


def _thinned(series: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return at most 400 points of a series, the first and the last among them; the means of what lies between."""
    if len(series) <= _MOST_POINTS:
        return series
    parts = np.array_split(series[1:-1], _MOST_POINTS - 2)
    return np.concatenate([series[:1], [part.mean(0) for part in parts], series[-1:]])


def _curve(run: Run, key: str) -> figures.Curve:
    series = run.metrics.get(key, np.zeros((0, 2)))
    series = _thinned(series[np.isfinite(series).all(1)])
    return figures.Curve(run.name, series[:, 0], series[:, 1], figures.INK)


def _curves(
    runs: Sequence[Run], keys: Sequence[str], styles: Styles, *, logx: bool = False, logy: bool = False
) -> list[Figure]:
    drawn = []
    for key in keys:
        lines = [_curve(run, key) for run in runs]
        if sum(len(line.x) for line in lines) <= sum(len(line.x) > 0 for line in lines):
            continue  # a single value each: the table says it
        figure = figures.overlay(
            lines, _of(runs, styles), xlabel="updates", ylabel=_short(key), logx=logx, logy=logy, floor_quantile=0.02
        )
        ends = ", ".join(f"{line.label} {line.y[-1]:.4g}" for line in lines if len(line.y))
        drawn.append(Figure(figures.as_svg(figure), "", f"{key} against updates; last values: {ends}", _short(key)))
    return drawn


def _gap_figure(runs: Sequence[Run], metric: str | None, styles: Styles) -> list[Figure]:
    """Return the last value of a metric by batch size, if there are several sizes."""
    points = {}
    for run in runs if metric else ():
        batch, value = _batch(run), run.last(metric or "")
        if batch is not None and value is not None:
            points[run.name] = (batch, value)
    if metric is None or len({batch for batch, _ in points.values()}) < 2:
        return []
    figure = figures.scatter(
        list(points.values()),
        [styles[name] for name in points],
        xlabel="batch (samples per update)",
        ylabel=_short(metric),
    )
    return [
        Figure(
            figures.as_svg(figure),
            "What the last weights of each run reach, against the samples of one update.",
            f"{metric} by batch size",
            "The generalization gap by batch size",
        )
    ]


def _pictures(runs: Sequence[Run], keys: Sequence[str]) -> list[Figure]:
    return [
        Figure(run.pictures[key], "", f"{key} of {run.name}", f"{run.name} · {_short(key)}")
        for run in runs
        for key in keys
        if key in run.pictures
    ]


# ---------------------------------------------------------------- sections


def _having(runs: Sequence[Run], prefix: str) -> list[Run]:
    return [run for run in runs if any(key.startswith(prefix) for key in (*run.metrics, *run.config))]


def _results_section(runs: Sequence[Run], metrics: Sequence[str], styles: Styles) -> Section | None:
    runs = [run for run in runs if any(key in run.metrics for key in metrics)]
    if not metrics:
        return None
    shown = [key for key in metrics if _HELD_OUT.search(key)][:_MOST_COLUMNS] or list(metrics[:_MOST_COLUMNS])
    shown += [key for key in metrics if _TRAINING.search(key) and key not in shown][: _MOST_COLUMNS - len(shown)]
    gallery = _curves(runs, list(metrics[:_MOST_CURVES]), styles)
    marked = [key for key in shown if better(key)]
    lead = f"{_count(len(runs), 'run')}, {_count(len(metrics), 'metric')} of their own."
    if marked and len(runs) > 1:
        winner, value = _best(runs, marked[0])
        lead += f" By {_short(marked[0])}, {winner.name} ends best, at {value:.4g}."
    blocks: list[ResultTable | Gallery | Legend] = [results_table(runs, shown)]
    return Section("Results", lead, blocks + _with_legend(runs, gallery, styles))


def _with_legend(
    runs: Sequence[Run], gallery: Sequence[Figure], styles: Styles
) -> list[ResultTable | Gallery | Legend]:
    if not gallery:
        return []
    return [
        Legend("Runs", [run.name for run in runs], _of(runs, styles)),
        Gallery(gallery, 2 if len(gallery) > 1 else 1),
    ]


def _best(runs: Sequence[Run], key: str) -> tuple[Run, float]:
    known = [(run, value) for run in runs if (value := run.last(key)) is not None]
    return (max if better(key) == "max" else min)(known, key=lambda each: each[1])


def _regime_section(runs: Sequence[Run], metrics: Sequence[str], styles: Styles) -> Section | None:
    runs = _having(runs, _REGIME)
    if not runs:
        return None

    def planned(name: str) -> list[Any]:
        return [run.config.get(_REGIME + name) for run in runs]

    columns: dict[str, tuple[Sequence[Any], Any]] = {
        "Reference batch": (planned("reference_batch_size"), None),
        "Batch": (planned("batch_size"), None),
        "Rule": (planned("lr_rule"), None),
        "Rate\u00a0×": ([None if x is None else float(x) for x in planned("lr_factor")], None),
        "Updates of the reference": ([_int(x) for x in planned("reference_updates")], None),
        "Updates": ([_int(x) for x in planned("updates")], None),
        "Epochs of the reference": ([_int(x) for x in planned("reference_epochs")], None),
        "Epochs": ([_int(x) for x in planned("epochs")], None),
        "Critical batch": ([run.last(f"{_REGIME}critical_batch_size") for run in runs], None),
    }
    caption = (
        "What LargeBatchRegime made of each reference run. The critical batch is what GradientNoiseScale measured: "
        "beyond it, a larger batch saves few updates."
    )
    held_out = next((key for key in metrics if _HELD_OUT.search(key) and better(key)), None)
    rates = f"{_REGIME}learning_rate"
    gallery = _gap_figure(runs, held_out, styles)
    gallery += _curves(runs, [rates, f"{_REGIME}clipped_fraction"], styles)
    gallery += _curves(runs, [f"{_REGIME}noise_scale"], styles, logy=True)
    return Section(
        "Large batches",
        f"The regime of {_count(len(runs), 'run')}: batch, learning rate and length beside the reference run's.",
        [_table("Regimes", runs, columns, caption), *_with_legend(runs, gallery, styles)],
        "Hoffer, Hubara, Soudry 2017 · Train longer, generalize better",
    )


def _int(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _diffusion_section(runs: Sequence[Run], styles: Styles) -> Section | None:
    key = f"{_DIFFUSION}distance"
    runs = [run for run in runs if key in run.metrics]
    if not runs:
        return None

    def fitted(name: str) -> list[float | None]:
        return [run.last(_DIFFUSION + name) for run in runs]

    laws = [
        None if None in law else law
        for law in zip(
            *(fitted(name) for name in ("log_intercept", "log_slope", "first_update", "last_update")), strict=True
        )
    ]
    lines = [_curve(run, key) for run in runs]
    overlay = figures.overlay(
        lines, _of(runs, styles), xlabel="updates t", ylabel="‖wₜ − w₀‖", logx=True, wide=True,
        laws=laws,
    )  # fmt: skip
    gallery = [
        Figure(
            figures.as_svg(overlay),
            "The distance from the initial weights against the logarithm of the update. Dashed: the law a + b·log t, "
            "over the updates it was fitted to. The paper's claim is that runs with one slope explore alike.",
            "Distance from the initial weights against log updates: "
            + ", ".join(f"{line.label} ends at {line.y[-1]:.4g}" for line in lines if len(line.y)),
            "Ultra-slow diffusion",
        )
    ]
    gallery += _curves(runs, [f"{_DIFFUSION}relative_distance", f"{_DIFFUSION}cosine"], styles, logx=True)
    columns: dict[str, tuple[Sequence[Any], Any]] = {
        "Last distance": ([run.last(key) for run in runs], None),
        "Slope b": (fitted("log_slope"), None),
        "R² of a + b·log t": (fitted("log_r2"), None),
        "Exponent p": (fitted("power_exponent"), None),
        "R² of c·tᵖ": (fitted("power_r2"), None),
        "Weight of the logarithm": (fitted("log_weight"), None),
        "α": (fitted("alpha"), None),
    }
    caption = (
        "Both laws over the longest stretch of constant learning rate, as UltraSlowDiffusion fitted them at the end of "
        "each run; nothing where a run spans under two decades of updates or was cut off. The weight is Akaike's."
    )
    return Section(
        "Distance from the start",
        f"How far the weights of {_count(len(runs), 'run')} travelled, and by which law.",
        [Legend("Runs", [run.name for run in runs], _of(runs, styles)), Gallery(gallery[:1], 1), *_rest(gallery[1:]),
         _table("Laws of diffusion", runs, columns, caption)],
        "Hoffer, Hubara, Soudry 2017 · section 3",
    )  # fmt: skip


def _rest(gallery: Sequence[Figure]) -> list[Gallery]:
    return [Gallery(gallery, 2)] if gallery else []


def _monge_section(runs: Sequence[Run], styles: Styles) -> Section | None:
    runs = [run for run in runs if any(key.startswith(_MONGE) for key in run.metrics)]
    if not runs:
        return None
    known = {key for run in runs for key in run.metrics if key.startswith(_MONGE)}
    stages = [stage for stage in ("test", "val", "train") if any(_short(key).startswith(stage) for key in known)]
    ordered = [f"{_MONGE}{stage}_{name}" for stage in stages for name in _MONGE_ORDER]
    present = [key for key in ordered if key in known]
    # A loss of another weight, and a gap of another cost, are other quantities.
    same = {name: len({run.config.get(name) for run in runs}) == 1 for name in ("cost", "gap_weight")}
    unmarked = {"displacement": True, "loss": not all(same.values()), "monge_gap": not same["cost"]}
    best = {key: None if unmarked.get(_short(key).partition("_")[2]) else better(key) for key in present}
    held_out = [key for key in present if "/train_" not in key] or present
    columns: dict[str, tuple[Sequence[Any], Any]] = {
        _short(key).replace("_", " "): ([run.last(key) for run in runs], best[key]) for key in held_out[:_MOST_COLUMNS]
    }
    columns = {"cost": ([_text(run.config.get("cost")) for run in runs], None), **columns}
    columns |= {"λ": ([_float(run.config.get("gap_weight")) for run in runs], None)}
    caption = (
        "The last values. The divergence tells how far the images are from the target, the gap what the map pays over "
        "an optimal one for its cost; neither a gap of another cost nor a loss of another weight λ is marked."
    )
    curves = _curves(runs, [key for key in present if "/train_" not in key][:4] or present[:4], styles)
    maps = _pictures(runs, [f"{_MONGE}map"])
    blocks: list[ResultTable | Gallery | Legend] = [_table("Maps", runs, columns, caption)]
    blocks += _with_legend(runs, curves, styles)
    if maps:
        blocks.append(Gallery(maps, 1 if len(maps) == 1 else 2))
    return Section(
        "Transport maps",
        f"{_count(len(runs), 'map')}: fit, Monge gap, and where samples go.",
        blocks,
        "Uscidda, Cuturi 2023 · The Monge gap",
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _other_section(runs: Sequence[Run]) -> Section | None:
    keys = sorted({key for run in runs for key in run.pictures} - {f"{_MONGE}map", f"{_DIFFUSION}figure"})
    pictures = _pictures(runs, keys)
    if not pictures:
        return None
    return Section("Pictures", "What the runs logged besides.", [Gallery(pictures, 2)])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _facts(runs: Sequence[Run], metrics: Sequence[str]) -> list[Fact]:
    facts = [Fact(f"{len(runs)}", "run" if len(runs) == 1 else "runs", ", ".join(sorted({run.kind for run in runs})))]
    scored = [key for key in metrics if _HELD_OUT.search(key) and better(key)][:2]
    monge = [f"{_MONGE}{stage}_sinkhorn_divergence" for stage in ("test", "val")]
    scored += [key for key in monge if any(key in run.metrics for run in runs)][:1]
    for key in scored:
        winner, value = _best(runs, key)
        facts.append(Fact(f"{value:.4g}", f"best {_short(key)}", winner.name))
    return facts


def compare(runs: Sequence[Run], *, title: str | None = None, left_out: Sequence[str] = ()) -> Report:
    """Return the report of some runs: results with the best marked, regimes, diffusion and maps, as far as logged.

    Args:
        runs: At least one run.
        title: Heading of the page; what is compared, by default.
        left_out: Why runs are missing that were to be compared, for the foot of the page.

    Raises:
        ValueError: There is no run.
    """
    if not runs:
        raise ValueError("runs is empty: give at least one")
    metrics, styles = result_metrics(runs), {run.name: number for number, run in enumerate(runs)}
    sections = (
        _results_section(runs, metrics, styles),
        _regime_section(runs, metrics, styles),
        _diffusion_section(runs, styles),
        _monge_section(runs, styles),
        _other_section(runs),
    )
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    return Report(
        title=title or name,
        summary="Read from the files that the runs' loggers left: "
        + ", ".join(f"{run.name} ({run.kind})" for run in runs[:12])
        + (f", and {len(runs) - 12} more." if len(runs) > 12 else "."),
        facts=_facts(runs, metrics),
        sections=[section for section in sections if section is not None],
        configuration={
            run.name: {"folder": str(run.path), **{key: run.config[key] for key in sorted(run.config)}} for run in runs
        },
        footer=("Losing rows are shown as they came.", *(f"Left out: {reason}." for reason in left_out)),
    )
