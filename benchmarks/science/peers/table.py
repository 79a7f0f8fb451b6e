"""Tables of docs/results/maps_against_peers.md: this package's maps, other libraries', floors, published figures.

python -m benchmarks.science.peers.table           # write the page's tables
python -m benchmarks.science.peers.table --check   # only say which tables the logs contradict

It reads ``peer_maps.jsonl``, which ``maps.py`` writes, all ``known_maps*.jsonl``, this package's own rows, and
``known_costs.jsonl``, of ``known_costs.py``. In the first two a row is a run:

    {"solver": ..., "pairs": "w2", "rays" or "powers", "dim": ..., "seed": ..., "uvp": L2-UVP in %, "cosine": ...,
     "cpu_seconds": of everything, compilation too, "budget": CPU seconds of training, if it is what ends it,
     "config": {...}}

and, where they are known, ``"wall_seconds"``, ``"compile_cpu_seconds"``, ``"samples"`` of each measure if not all,
``"note"``, and ``"curve"``, a list of CPU seconds, wall seconds and L2-UVP on the way. ``"uvp"`` is null where a solver
refuses the pairs, and the note says why.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.logs import read as read_log
from benchmarks.marked import DOCS, command, table
from benchmarks.measurements import PUBLISHED

__all__ = ["PAGE", "blocks", "main", "read", "seconds_to"]

PAGE = DOCS / "results" / "maps_against_peers.md"
DIMS = {"w2": (2, 4, 8, 16, 32), "rays": (2, 8, 32), "powers": (2, 8, 32)}
FLOORS = ("identity", "mean shift", "POT LinearTransport")
# How the table's groups begin, in their order; this package's own are what is in none.
PEERS = (
    "OTT W2NeuralDual", "OTT ExpectileNeuralDual", "OTT MongeGapEstimator", "OTT entropic map", "OTT ProgOT",
    "POT SinkhornTransport", "POT EMDTransport", "POT MappingTransport",
)  # fmt: skip
# Pairs by the cost of the log of known_costs.py.
KINDS = {"euclidean": "rays", "pnorm(p=1.5)": "powers"}
ALIASES = {"mix3to10": "w2"}
# This package's maps in the log of known_costs.py.
MAPS = {
    "default": "MongeMap, default", "plan": "ResidualMLP, start at a plan",
    "free": "ResidualMLP, no gap", "gap": "ResidualMLP, gap",
}  # fmt: skip
TARGET, TARGET_DIM = 10.0, 8
Rows = list[dict[str, Any]]


def read(logs: Path) -> Rows:
    """Return the rows of all logs."""
    own = [row for log in sorted(logs.glob("known_maps*.jsonl")) for row in read_log(log)]
    own += [_of_other_costs(row) for row in read_log(logs / "known_costs.jsonl") if _same_samples(row)]
    rows = [row | {"pairs": ALIASES.get(row.get("pairs"), row.get("pairs"))} for row in own]
    return [row for row in [*rows, *read_log(logs / "peer_maps.jsonl")] if row["pairs"] in DIMS]


def where(rows: Rows, **wanted: Any) -> Rows:
    """Return the rows that have these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def solvers(rows: Rows) -> list[str]:
    """Return the solvers' names: floors, this package's, and the peers'."""

    def place(name: str) -> int:
        if name in FLOORS:
            return FLOORS.index(name) - len(FLOORS) - 1
        return next((i for i, peer in enumerate(PEERS) if name.startswith(peer)), -1)

    return sorted(dict.fromkeys(row["solver"] for row in rows), key=place)


def middle_and_range(values: Sequence[float]) -> str:
    """Return "median (least to largest)", to three digits."""
    low, middle, high = (_digits(value) for value in (min(values), float(np.median(values)), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def seconds_to(curve: Sequence[Sequence[float]], target: float = TARGET) -> tuple[float, float] | None:
    """Return the CPU and the wall seconds after which a curve is below the target for the first time."""
    return next(((cpu, wall) for cpu, wall, error in curve if error <= target), None)


def blocks(rows: Rows) -> dict[str, str]:
    """Return the tables of the page."""
    w2 = where(rows, pairs="w2")
    return {
        "w2": _errors(w2, "w2", _published()),
        "rays": _errors(where(rows, pairs="rays"), "rays", []),
        "powers": _errors(where(rows, pairs="powers"), "powers", []),
        "cosines": _cosines(w2),
        "time": _times(where(w2, dim=TARGET_DIM)),
        "configurations": _configurations(rows),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, or check it."""
    command(__doc__, "maps_against_peers", lambda logs: blocks(read(logs)), lambda logs, images: None, arguments)


def _same_samples(row: dict[str, Any]) -> bool:
    # There each seed has a pair of its own, and the peers have the first one.
    return row.get("cost") in KINDS and row.get("seed") == 0 and row.get("map") in MAPS


def _of_other_costs(row: dict[str, Any]) -> dict[str, Any]:
    named = {
        "solver": MAPS[row["map"]],
        "pairs": KINDS[row["cost"]],
        "dim": row["D"],
        "cpu_seconds": row.get("seconds"),
    }
    return named | {name: row[name] for name in ("seed", "uvp", "cosine")} | {"budget": row.get("budget"), "config": {}}


def _digits(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _errors(rows: Rows, pairs: str, below: list[list[str]]) -> str:
    lines = []
    for name in solvers(rows):
        own = where(rows, solver=name)
        cells = [_cell(where(own, dim=dim)) for dim in DIMS[pairs]]
        spent = [row["cpu_seconds"] for row in own if row.get("cpu_seconds") is not None]
        seeds = max(len(where(own, dim=dim)) for dim in DIMS[pairs]) if own[0].get("seed") is not None else ""
        title = f"**{name}**" if not name.startswith((*FLOORS, *PEERS)) else name
        lines.append([title, *cells, f"{np.median(spent):.0f}" if spent and max(spent) >= 0.5 else "", seeds])
    return table(["map", *(f"D = {dim}" for dim in DIMS[pairs]), "CPU s", "seeds"], [*lines, *below])


def _cell(rows: Rows) -> str:
    if not rows:
        return "not run"
    found = [row["uvp"] for row in rows if row["uvp"] is not None]
    return middle_and_range(found) if found else "refused"


def _published() -> list[list[str]]:
    return [[f"{name}, published", *(str(of[dim]) for dim in DIMS["w2"]), "", ""] for name, of in PUBLISHED.items()]


def _cosines(rows: Rows) -> str:
    lines = []
    for name in solvers(rows):
        found = {
            dim: [r["cosine"] for r in where(rows, solver=name, dim=dim) if r["uvp"] is not None] for dim in DIMS["w2"]
        }
        lines.append([name, *(f"{np.median(values):.3f}" if values else "" for values in found.values())])
    return table(["map", *(f"D = {dim}" for dim in DIMS["w2"])], lines)


def _times(rows: Rows) -> str:
    lines = []
    for name in solvers(rows):
        with_curves = [row for row in where(rows, solver=name) if row.get("curve")]
        if not with_curves:
            continue
        reached = [seconds_to(row["curve"]) for row in with_curves]
        known = [seconds for seconds in reached if seconds]
        compiled = [row.get("compile_cpu_seconds", 0.0) for row in with_curves]
        cells = [middle_and_range([seconds[i] for seconds in known]) if known else "never" for i in (0, 1)]
        ends = middle_and_range([row["curve"][-1][2] for row in with_curves])
        lines.append([name, *cells, f"{max(compiled):.0f}", f"{len(known)} of {len(with_curves)}", ends])
    titles = [
        "map",
        f"CPU s to {TARGET:g} %",
        "wall s",
        "of these compiling, at most",
        "seeds that reach it",
        "at the end, %",
    ]
    return table(titles, lines)


def _configurations(rows: Rows) -> str:
    lines = []
    for name in solvers(rows):
        own = where(rows, solver=name)
        config = own[0].get("config", {})
        samples = own[0].get("samples") or ""
        budget = own[0].get("budget")
        notes = dict.fromkeys(str(row["note"]) for row in own if row.get("note"))
        text = ", ".join([f"{key} {_plain(value)}" for key, value in config.items()] + list(notes))
        lines.append([name, text, samples, f"{budget:g} CPU s" if budget else ""])
    return table(["map", "configuration", "samples of each", "budget"], lines)


def _plain(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    main()
