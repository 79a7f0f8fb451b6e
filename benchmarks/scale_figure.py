"""The picture a solver is chosen by: seconds against the number of samples, from the logs of the benchmarks."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["LOGS", "draw", "lines_of"]

LOGS = ("scale", "scale_keops", "scale_million", "scale_ott", "scale_dims")
NAMES = {"online": "GeomLoss, KeOps", "multiscale": "GeomLoss, multiscale", "ott": "OTT-JAX"}
Line = list[tuple[int, float]]


def lines_of(logs: Mapping[str, Mapping[str, Any]]) -> dict[str, Line]:
    """Return the sizes and median seconds of each solver, dimension and tolerance that the logs hold."""
    lines: dict[str, Line] = {}
    for log in (name for name in LOGS if name in logs):
        for row in logs[log]["rows"]:
            if not isinstance(row["seconds"], Mapping):
                continue  # left out, with the reason
            dims = "" if log != "scale_dims" else f", d = {row['d']}, marginal error 0.03"
            label = f"{NAMES.get(row['solver'], row['solver'])}{dims}"
            lines.setdefault(label, []).append((row["n"], row["seconds"]["median"]))
    return {label: sorted(points) for label, points in lines.items()}


def draw(logs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (label, points) in enumerate(lines_of(logs).items()):
        sizes, seconds = zip(*points, strict=True)
        line = "--" if "marginal error" in label else "-"
        axes.plot(sizes, seconds, marker="o", color=f"C{number % 10}", label=label, linestyle=line)
    axes.set(xscale="log", yscale="log", xlabel="samples of each side", ylabel="seconds, value and gradient")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=110, metadata=_metadata(logs))


def _metadata(logs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    days: Iterable[str] = (logs[name]["date"] for name in LOGS if name in logs)
    return {"Software": "matplotlib", "Description": f"measured {', '.join(sorted(set(days)))}"}
