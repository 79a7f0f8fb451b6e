"""Rerun every benchmark, keep what it found as logs, and write docs/results/performance.md from them.

    python -m benchmarks.performance all [--peers PYTHON] [--data FOLDER]
    python -m benchmarks.performance run [--only NAME ...] [--again] [--science]
    python -m benchmarks.performance page
    python -m benchmarks.performance list

``run`` runs the benchmarks of speed and memory, about 45 minutes on two cores. Each leaves a line
in ``benchmarks/results/performance.jsonl``: its rows as data, all that it printed, the machine, its load before and
after, and how many cores other processes took meanwhile. One that this code has logged already is not repeated unless
``--again``: a log knows the package's and the benchmark's sources by their hash. One that needs what is not there (a
GPU, data, a compiler) is skipped, with the reason. ``--science`` runs the benchmarks of accuracy instead, whose results
have pages of their own, and leaves what they print in ``--logs`` too.

``page`` fills the marked blocks of the page from the logs alone. ``all`` is both.

``--peers`` is a Python with ``benchmarks/requirements.txt`` and this package's dependencies; without it this Python is
taken where it has OTT-JAX. ``--data`` is the folder of the Wasserstein-2 benchmark pairs, and for ``--science`` of
cells and images. ``--quick`` takes tiny sizes, to see that all is well; its logs say so.

Run it on a machine that does nothing else: others should take next to no cores.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.catalogue import NEEDS, SCIENCE, SPEED, Benchmark
from benchmarks.logs import RESULTS, put
from benchmarks.logs import read as read_log
from benchmarks.machine import busy, machine, versions
from benchmarks.marked import differences, write
from benchmarks.performance_page import blocks, command
from benchmarks.processes import ROOT, run_module
from benchmarks.scale_figure import draw

LOG = "performance.jsonl"
PAGE = ROOT / "docs" / "results" / "performance.md"
SCALE = ROOT / "docs" / "images" / "transport_scale.png"


def sources(module: str) -> str:
    """Return a hash of a benchmark's code, of what it imports from these folders, and of the package."""
    found, left = set(), {_file(f"benchmarks.{module}")}
    while left:
        path = left.pop()
        found.add(path)
        code = path.read_text(encoding="utf-8")
        for module, names in re.findall(r"^\s*from (benchmarks[.\w]*) import \(?([\w, ]*)", code, flags=re.MULTILINE):
            folder = _file(module).with_suffix("")
            modules = {f"{module}.{name.split()[0]}" for name in names.split(",")} if folder.is_dir() else {module}
            left |= set(map(_file, modules)) - found
    digest = hashlib.sha256()
    for path in sorted(found | set((ROOT / "lightning_gap").rglob("*.py"))):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _file(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def missing(benchmark: Benchmark, options: argparse.Namespace) -> list[str]:
    """Return what a benchmark needs that is not there."""

    def there(need: str) -> bool:
        if need == "cuda":
            import torch

            return torch.cuda.is_available()
        return {
            "peers": options.peers is not None,
            "data": options.data is not None,
            "compiler": any(shutil.which(name) for name in ("c++", "g++", "clang++")),
            "linux": sys.platform == "linux",
        }[need]

    return [NEEDS[need] for need in benchmark.needs if not there(need)]


def read(logs: Path) -> dict[str, dict[str, Any]]:
    """Return the logs by name."""
    return {log.pop("name"): log for log in read_log(logs / LOG)}


def run_one(name: str, benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    """Run a benchmark, and return its log."""
    arguments = benchmark.line(options.quick)
    given = {"PEERS": options.peers, "DATA": options.data, "OUTPUT": options.logs / name}
    words = shlex.split(arguments)
    handed = [re.sub("PEERS|DATA|OUTPUT", lambda found: str(given[found[0]]), word) for word in words]
    python = options.peers if "peers" in benchmark.needs and "PEERS" not in words else sys.executable
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        line = [f"benchmarks.{handed[0]}", *handed[1:], *(["--json", str(file)] if benchmark.rows else [])]
        before, others, start = os.getloadavg()[0], busy(), time.perf_counter()
        done = run_module(*line, python=python, capture_output=True, cwd=folder, env=environment)
        seconds, after, others_after = time.perf_counter() - start, os.getloadavg()[0], busy()
        if done.returncode:
            raise RuntimeError(f"ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    log = {
        "command": command(arguments),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "quick": bool(options.quick),
        "sources": sources(words[0]),
        "machine": machine(),
        "versions": versions(str(python)),
        "load": {"before": round(before, 2), "after": round(after, 2)},
        # What others did meanwhile: the load before a benchmark is mostly that of the benchmark before it.
        "others_cores": None if others is None else round(max(0.0, others_after - others) / seconds, 2),
        "seconds": round(seconds, 1),
        "rows": rows,
        "printed": done.stdout.splitlines(),
    }
    # Where things lie on this machine is nobody's business.
    hidden = {str(ROOT): ".", str(options.peers): "PEERS", str(options.data): "DATA", str(Path.home()): "~"}
    text = json.dumps(log, ensure_ascii=False)
    for path, shown in hidden.items():
        if path not in ("None", "/"):
            text = text.replace(path, shown)
    return json.loads(text)


def run(options: argparse.Namespace) -> int:
    """Run what is asked for and has no log yet; return how many failed."""
    chosen = SCIENCE if options.science else SPEED
    names = options.only or list(chosen)
    known, failed = read(options.logs), 0
    left = sum(chosen[name].minutes for name in names if not missing(chosen[name], options))
    for name in names:
        benchmark = chosen[name]
        arguments = benchmark.line(options.quick)
        absent, log = missing(benchmark, options), known.get(name)
        if absent:
            print(f"{name}: skipped, needs {' and '.join(absent)}", flush=True)
            continue
        left -= benchmark.minutes
        same = log and log["sources"] == sources(shlex.split(arguments)[0]) and log["command"] == command(arguments)
        if same and not options.again:
            print(f"{name}: logged already, by this code", flush=True)
            continue
        about = "a tiny run" if options.quick else f"about {benchmark.minutes:g} min, then {max(left, 0):.0f} more"
        print(f"{name}: {benchmark.measures} ({about}) ...", end=" ", flush=True)
        try:
            log = run_one(name, benchmark, options)
        except RuntimeError as error:
            failed += 1
            print(f"failed\n{error}", flush=True)
            continue
        put(options.logs / LOG, {"name": name, **log}, lambda known, name=name: known["name"] == name)
        print(f"{log['seconds']:.0f} s, others took {log['others_cores']} cores", flush=True)
    return failed


def show() -> None:
    """Print all benchmarks."""
    for title, chosen in (("speed and memory", SPEED), ("accuracy, --science", SCIENCE)):
        print(f"{title}: about {sum(one.minutes for one in chosen.values() if 'cuda' not in one.needs):.0f} minutes")
        for name, one in chosen.items():
            needs = f"  [needs {', '.join(NEEDS[need] for need in one.needs)}]" if one.needs else ""
            print(f"  {name:20} {one.minutes:6g} min  {one.measures}{needs}\n{'':32}{command(one.arguments)}")


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "page", "all", "list"))
    parser.add_argument("--only", nargs="+", choices=[*SPEED, *SCIENCE], metavar="NAME", help="see list")
    parser.add_argument("--science", action="store_true", help="the benchmarks of accuracy")
    parser.add_argument("--again", action="store_true", help="also what this code has logged already")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    # No resolving: the Python of a virtual environment is a link.
    parser.add_argument("--peers", type=lambda text: Path(text).absolute(), help="a Python with the peers")
    parser.add_argument("--data", type=lambda text: Path(text).resolve(), default=os.environ.get("LIGHTNING_GAP_DATA"))
    parser.add_argument("--logs", type=lambda text: Path(text).resolve(), default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.peers is None and find_spec("ott") is not None:
        options.peers = Path(sys.executable)
    if options.only:
        options.science = options.only[0] in SCIENCE
        if any(name not in (SCIENCE if options.science else SPEED) for name in options.only):
            parser.error("--only takes benchmarks of speed, or of accuracy, not both")
    if options.action == "list":
        show()
        return
    failed = run(options) if options.action != "page" else 0
    if options.action != "run":
        made = blocks(read(options.logs))
        changed = differences(options.page, made)
        write(options.page, made)
        if options.page == PAGE and find_spec("matplotlib") is not None:
            draw(read(options.logs), SCALE)
        print(f"{options.page.name}: {', '.join(changed) or 'nothing'} changed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
