"""Tables and figures of docs/results/monge_gap.md, from the logs of ``suite.py``, ``ablations.py`` and a benchmark.

python -m benchmarks.science.monge_gap.results           # write the page's tables, and the figures
python -m benchmarks.science.monge_gap.results --check   # only say which tables the logs contradict
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.logs import read as read_log
from benchmarks.marked import DOCS, command, mean_and_std, table
from benchmarks.measurements import PUBLISHED
from benchmarks.science.monge_gap.settings import BASE, GAPS, LIBRARIES
from benchmarks.science.monge_gap.tasks import TASKS

PAGE = DOCS / "results" / "monge_gap.md"
LOGS = ("suite", "ablations", "known_maps", "displacements")
TIMED = ("lightning_gap", "ott")
COSTS = ("l2", "l22", "p1.5")
# What each ablation changes, and what it is called.
ABLATIONS = {
    "gap_weight": "λ",
    "relative_gap_epsilon": "ε of the gap, share of the mean cost",
    "relative_fitting_epsilon": "ε of the divergence, share of the mean cost",
    "batch": "batch",
    "convention": "convention",
}
OTHERS = {
    "gaussians": "L2-UVP in % between [Gaussians](../transport_maps.md#gaussians), median (least to largest):",
    "sphere": "[On the sphere](../transport_maps.md#the-sphere), the geodesic error in % of the mean displacement:",
}
SOURCE, TARGET, IMAGE = "#868c96", "#e08a1e", "#2f7fd0"
Rows = list[dict[str, Any]]


def read(logs: Path) -> dict[str, Rows]:
    """Return the rows of each log."""
    return {name: read_log(logs / f"monge_gap_{name}.jsonl") for name in LOGS}


def where(rows: Iterable[dict[str, Any]], **wanted: Any) -> Rows:
    """Return the rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def column(rows: Rows, name: str) -> list[float]:
    """Return what the rows have under a name."""
    return [row[name] for row in rows if name in row]


def middle_and_range(values: Sequence[float], digits: int = 2) -> str:
    """Return "median (least to largest)"."""
    if not values:
        return "not run"
    numbers = [f"{value:.{digits}f}" for value in (np.median(values), min(values), max(values))]
    return numbers[0] if len(values) == 1 else f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return the ends of Student's 95 % interval of the mean of paired differences."""
    values = np.asarray(differences)
    half = float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def blocks(logs: dict[str, Rows]) -> dict[str, str]:
    """Return the tables of the page."""
    known, ablations = logs["known_maps"], logs["ablations"]
    made = {
        "suite": _suite(logs["suite"]),
        "seconds": _seconds(logs["suite"]),
        "w2": _w2(where(known, section="w2")),
        "other known maps": _others(known),
        "headline": _headline(ablations),
    }
    return made | {f"ablation of {name}": _ablation(ablations, name) for name in ABLATIONS}


def _suite(rows: Rows) -> str:
    lines = []
    for task in TASKS:
        for gap, name in GAPS.items():
            for library, title in LIBRARIES.items():
                found = where(rows, task=task, gap=gap, library=library)
                if not found:
                    continue
                first = gap == next(iter(GAPS)) and library == next(iter(LIBRARIES))
                shares = [[100 * row[f"gap_{cost}"] / row[f"paid_{cost}"] for row in found] for cost in COSTS]
                own = [mean_and_std(values) for values in shares]
                if gap in COSTS:
                    own[COSTS.index(gap)] = f"**{own[COSTS.index(gap)]}**"
                floor = mean_and_std(column(found, "floor"), 4) if first else ""
                lines.append([
                    TASKS[task].title if first else "", name if library == next(iter(LIBRARIES)) else "", title,
                    mean_and_std(column(found, "divergence"), 4), floor, *own,
                ])  # fmt: skip
    titles = ["task", "gap in the loss", "", "divergence", "floor"]
    return table([*titles, "ℓ2 gap, %", "ℓ2² gap, %", "p = 1.5 gap, %"], lines)


def _seconds(rows: Rows) -> str:
    lines = []
    for gap, name in GAPS.items():
        groups = [where(rows, gap=gap, library=library) for library in TIMED]
        cells = [middle_and_range(column(group, "seconds"), 1) for group in groups]
        lines.append([name, *cells])
    return table(["gap in the loss", *(f"{LIBRARIES[library]}, CPU s" for library in TIMED)], lines)


def _w2(rows: Rows) -> str:
    lines = []
    for dim in sorted({row["D"] for row in rows}):
        of_dim = where(rows, D=dim)
        found = where(of_dim, map="BrenierMap")
        plain = [f"{where(of_dim, map=name)[0]['uvp']:.1f}" for name in ("identity", "Gaussian")]
        lines.append([
            dim, *plain, f"**{middle_and_range(column(found, 'uvp'))}**", f"{np.median(column(found, 'cosine')):.3f}",
            len(found), f"{np.median(column(found, 'seconds')):.0f}", *(of[dim] for of in PUBLISHED.values()),
        ] if found else [dim, *plain, "not run", "", 0, "", *(of[dim] for of in PUBLISHED.values())])  # fmt: skip
    return table(["D", "identity", "linear", "`BrenierMap`", "its cosine", "seeds", "CPU s", *PUBLISHED], lines)


def _others(rows: Rows) -> str:
    """Return the tables of the benchmark's other sections, where the log has them."""
    parts = []
    for section, made in (("gaussians", _gaussians), ("sphere", _sphere)):
        found = where(rows, section=section)
        if found:
            parts += [OTHERS[section], made(found)]
    return "\n\n".join(parts)


def _gaussians(rows: Rows) -> str:
    lines = []
    dims = sorted({row["D"] for row in rows})
    for name in dict.fromkeys(row["map"] for row in rows):
        cells = [middle_and_range(column(where(rows, map=name, D=dim), "uvp"), 3) for dim in dims]
        spent = column(where(rows, map=name), "seconds")
        lines.append([name, *cells, f"{np.median(spent):.0f}" if spent else ""])
    return table(["map", *(f"d = {dim}" for dim in dims), "CPU s"], lines)


def _sphere(rows: Rows) -> str:
    lines = []
    for name in dict.fromkeys(row["map"] for row in rows):
        found = where(rows, map=name)
        cells = [middle_and_range(column(found, "error")), middle_and_range(column(found, "gap"), 5)]
        lines.append([name, len(found), f"{np.median(column(found, 'seconds')):.0f}", *cells])
    return table(["map", "seeds", "CPU s", "error, %", "exact gap"], lines)


def pairs(rows: Rows, dim: int) -> list[tuple[float, float]]:
    """Return L2-UVP without and with the gap, seed by seed."""
    without, with_gap = ({row["seed"]: row["uvp"] for row in _like(rows, D=dim, gap_weight=w)} for w in (0.0, 1.0))
    return [(without[seed], with_gap[seed]) for seed in sorted(without.keys() & with_gap.keys())]


def _like(rows: Rows, **changed: Any) -> Rows:
    """Return the rows at the base settings but for these."""
    return where(rows, **BASE | changed)


def _headline(rows: Rows) -> str:
    lines = []
    for dim in sorted({row["D"] for row in rows}):
        found = pairs(rows, dim)
        if len(found) < 2:
            continue
        without, with_gap = zip(*found, strict=True)
        low, high = interval([a - b for a, b in found])
        gaps = [mean_and_std(column(_like(rows, D=dim, gap_weight=w), "gap")) for w in (0.0, 1.0)]
        better = sum(b < a for a, b in found)
        lines.append([
            dim, mean_and_std(without), mean_and_std(with_gap),
            f"{np.mean(without) - np.mean(with_gap):.2f} [{low:.2f}, {high:.2f}]", f"{better} of {len(found)}", *gaps,
        ])  # fmt: skip
    titles = ["D", "L2-UVP, λ = 0", "L2-UVP, λ = 1", "less by, 95 % interval", "better seeds"]
    return table([*titles, "gap, λ = 0", "gap, λ = 1"], lines)


def values(rows: Rows, name: str) -> list[Any]:
    """Return what an ablation was run with, in order; text in the order of the log."""
    of_log = {
        row[name]: None for row in rows if all(row[other] == value for other, value in BASE.items() if other != name)
    }
    return list(of_log) if name == "convention" else sorted(of_log)


def _ablation(rows: Rows, name: str) -> str:
    # Dimensions where something was changed.
    dims = sorted(
        {row["D"] for value in values(rows, name) for row in _like(rows, **{name: value}) if value != BASE[name]}
    )
    if not dims:
        return "Not run."
    lines = []
    for value in values(rows, name):
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        line = [shown + (" (base)" if value == BASE[name] else "")]
        for dim in dims:
            found = _like(rows, D=dim, **{name: value})
            cells = [mean_and_std(column(found, score)) or "not run" for score in ("uvp", "gap", "divergence")]
            line += [*cells, f"{np.median(column(found, 'seconds')):.0f}" if found else ""]
        lines.append(line)
    scores = [f"D = {dim}: {score}" for dim in dims for score in ("L2-UVP", "gap", "divergence", "CPU s")]
    return table([ABLATIONS[name], *scores], lines)


def draw(logs: dict[str, Rows], images: Path) -> None:
    """Draw the maps in the plane, and the ablations."""
    _maps(logs["displacements"], images / "monge_gap_maps.png")
    _curves(logs["ablations"], images / "monge_gap_ablations.png")


def _maps(rows: Rows, out: Path) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from PIL import Image

    if not rows:
        return
    found = {(row["task"], row["gap"]): row["pairs"] for row in rows}
    tasks = [task for task in TASKS if any(key[0] == task for key in found)]
    spans = [np.ptp(np.asarray(found[task, "samples"]).reshape(-1, 2), axis=0) for task in tasks]
    heights = [max(3.0 * min(1.2, span[1] / span[0]), 1.5) for span in spans]
    figure = Figure(figsize=(3.0 * len(GAPS), sum(heights) + 0.4), dpi=100, layout="constrained")
    axes = figure.subplots(len(tasks), len(GAPS), squeeze=False, height_ratios=heights)
    for line, task in zip(axes, tasks, strict=True):
        drawn = np.asarray(found[task, "samples"])
        for ax, (gap, name) in zip(line, GAPS.items(), strict=True):
            ax.scatter(*drawn[:, :2].T, s=5, color=SOURCE, label="source", linewidth=0)
            ax.scatter(*drawn[:, 2:].T, s=5, color=TARGET, label="target", linewidth=0)
            moved = np.asarray(found.get((task, gap), np.zeros((0, 4))))
            ax.add_collection(LineCollection(list(moved.reshape(-1, 2, 2)), colors=IMAGE, linewidths=0.4, alpha=0.7))
            ax.scatter(*moved[:, 2:].T, s=5, color=IMAGE, label="image", linewidth=0, zorder=3)
            ax.set(xticks=[], yticks=[], aspect="equal")
            if task == tasks[0]:
                ax.set_title(name)
        line[0].set_ylabel(TASKS[task].title)
    figure.axes[0].legend(fontsize=7, loc="best")
    figure.savefig(out)
    # Few colours, a quarter of the size.
    with Image.open(out) as drawn:
        drawn.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(out, optimize=True)


def _curves(rows: Rows, out: Path) -> None:
    from matplotlib.figure import Figure

    if not rows:
        return
    names = [name for name in ABLATIONS if name != "convention"]
    dims = sorted({row["D"] for row in rows})
    figure = Figure(figsize=(3.1 * len(names), 2.8 * len(dims)), dpi=100, layout="constrained")
    for line, dim in zip(figure.subplots(len(dims), len(names), squeeze=False, sharey="row"), dims, strict=True):
        for ax, name in zip(line, names, strict=True):
            groups = [(value, column(_like(rows, D=dim, **{name: value}), "uvp")) for value in values(rows, name)]
            groups = [(value, found) for value, found in groups if found]
            if len(groups) < 2:
                ax.set_axis_off()
                continue
            # A weight of 0 has its place at the left end of the logarithmic axis.
            places = [value or 0.001 for value, _ in groups]
            ax.set(xscale="log", xlim=(min(places) / 1.6, max(places) * 1.6))
            for place, (_, found) in zip(places, groups, strict=True):
                ax.plot([place] * len(found), found, "o", markersize=4, alpha=0.6, color=IMAGE)
            ax.plot(places, [np.mean(found) for _, found in groups], color=IMAGE, linewidth=1)
            ax.axvline(BASE[name], color=SOURCE, linewidth=0.8, linestyle=":")
            ax.set_ylim(0, None)
            ax.set_xticks(places, [f"{value:g}" for value, _ in groups])
            ax.minorticks_off()
            ax.set_xlabel(ABLATIONS[name].replace(", share of the mean cost", ""))
        line[0].set_ylabel(f"L2-UVP, %, D = {dim}")
    figure.savefig(out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, or check it."""
    command(
        __doc__,
        "monge_gap",
        lambda logs: blocks(read(logs)),
        lambda logs, images: draw(read(logs), images),
        arguments,
    )


if __name__ == "__main__":
    main()
