"""The performance page, from its logs: tables of ratios with their spread, the machine, what is measured elsewhere."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.catalogue import NEEDS, SCIENCE, SPEED
from benchmarks.marked import table

__all__ = ["blocks", "command", "text_of"]


def command(arguments: str) -> str:
    """Return the command line as a log and the page show it."""
    return f"python -m benchmarks.{arguments}"


def text_of(value: Any) -> str:
    """Return a cell: a spread as its median and quartiles, a number to three digits."""
    if isinstance(value, Mapping):
        median, low, high = (three_digits(value[name]) for name in ("median", "low", "high"))
        return median if value["count"] == 1 else f"{median} ({low} to {high})"
    if isinstance(value, float):
        return f"{value:.3g}" if 1e-3 <= abs(value) < 1 else three_digits(value)
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def three_digits(value: float) -> str:
    """Return a measured number."""
    if 1 <= abs(value) < 1e9:
        return f"{value:,.{max(0, 3 - len(str(int(abs(value)))))}f}"
    return f"{value:#.3g}" if 1e-3 <= abs(value) < 1 else f"{value:.1e}" if value else "0"


def tables(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the tables of some rows, one for each title."""
    by_title: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_title.setdefault(row.get("table", ""), []).append({k: v for k, v in row.items() if k != "table"})
    made = []
    for title, of_title in by_title.items():
        columns = list(dict.fromkeys(name for row in of_title for name in row))
        cells = [[text_of(row.get(name, "")) for name in columns] for row in of_title]
        made.append((f"{title}:\n\n" if title else "") + table(columns, cells))
    return "\n\n".join(made)


def log_block(name: str, log: dict[str, Any] | None) -> str:
    """Return what the page shows of a benchmark."""
    benchmark = SPEED[name]
    if log is None:
        needs = " and ".join(NEEDS[need] for need in benchmark.needs if need == "cuda")
        return f"Not run{f': it needs {needs}' if needs else ' yet'}."
    others = "" if log.get("others_cores") is None else f"; other processes took {log['others_cores']:.2f} cores"
    quick = "**A tiny run, whose numbers mean nothing.** " if log["quick"] else ""
    return f"{tables(log['rows'])}\n\n{quick}`{log['command']}`, {log['date']}, {log['seconds']:.0f} s{others}."


def machine_block(logs: Mapping[str, dict[str, Any]]) -> str:
    """Return the machines and the versions of all logs."""
    lines = []
    for log in logs.values():
        found, versions_found = log["machine"], log["versions"]
        memory = f", {found['memory_GB']} GB of memory" if "memory_GB" in found else ""
        gpu = f", {found['gpu']}" if "gpu" in found else ""
        threads = f"{found['torch_threads']} threads of torch where the command names no other number"
        described = f"{found['cpu']} ({found['architecture']}), {found['cores']} cores, {threads}{memory}{gpu}"
        known = ", ".join(f"{name} {version}" for name, version in versions_found.items())
        lines.append(f"{described}, {found['system']}; {known}.")
    return "\n".join(f"- {line}" for line in dict.fromkeys(lines)) or "No logs yet."


def science_block() -> str:
    """Return the benchmarks of accuracy, and where their results are."""
    rows = [
        (one.measures, f"`{command(one.arguments)}`", f"{one.minutes:g}", f"[page]({one.page})")
        for one in SCIENCE.values()
    ]
    return table(("what", "command", "minutes, rough", "results"), rows)


def blocks(logs: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Return the page's blocks, by name."""
    speed = {name: log for name, log in logs.items() if name in SPEED}
    made = {name: log_block(name, speed.get(name)) for name in SPEED}
    return made | {"machine": machine_block(speed), "science": science_block()}
