"""Rerun every benchmark of this folder, keep what it found as logs, and write docs/results/performance.md from them.

    python benchmarks/performance.py all [--peers PYTHON] [--data FOLDER]
    python benchmarks/performance.py run [--only NAME ...] [--again] [--science]
    python benchmarks/performance.py page
    python benchmarks/performance.py list

``run`` runs the benchmarks of speed and memory, about 25 minutes on two cores. Each leaves a log in
``docs/results/logs/performance/``, with its rows as data, all that it printed, the machine, its load before and after,
and how many cores other processes took meanwhile. One that this code has logged already is not repeated unless
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
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
LOGS = ROOT / "docs" / "results" / "logs" / "performance"
PAGE = ROOT / "docs" / "results" / "performance.md"
REPRODUCTIONS = ROOT / "examples" / "reproductions"
sys.path.insert(0, str(REPRODUCTIONS))

from machine import processor  # noqa: E402
from marked import differences, table, write  # noqa: E402

# Distributions whose versions a log holds.
VERSIONS = ("torch", "lightning", "numpy", "geomloss", "pykeops", "POT", "ott-jax", "jax")
NEEDS = {
    "peers": "OTT-JAX, POT and GeomLoss (`--peers PYTHON`)",
    "data": "the data (`--data FOLDER`)",
    "compiler": "a C++ compiler",
    "cuda": "a CUDA device",
    "linux": "Linux",
}


@dataclass(frozen=True)
class Benchmark:
    """A command line of this folder, and what it is for.

    Attributes:
        arguments: Behind ``python benchmarks/``; PEERS and DATA stand for what the options give.
        measures: In words.
        minutes: Rough, on two cores that do nothing else.
        quick: The arguments of a tiny run.
        needs: Of ``NEEDS``. What needs the peers runs by their Python, unless it hands PEERS on.
        page: Where the results of a benchmark of accuracy are.
        rows: Whether it takes ``--json``.
    """

    arguments: str
    measures: str
    minutes: float
    quick: str = ""
    needs: tuple[str, ...] = ()
    page: str = ""
    rows: bool = True

    def line(self, quick: bool) -> str:
        """Return the arguments of a whole run, or of a tiny one where there is one."""
        return (quick and self.quick) or self.arguments


GHOST = "ghost_batch_norm.py"
SPEED = {
    "ghost_op": Benchmark(
        f"{GHOST} op --threads 1 --ghosts 32 128 --repeat 7 --reuse-memory",
        "Ghost BN forward and backward, against BatchNorm and peers' designs", 1.2,
        f"{GHOST} op --threads 1 --ghosts 32 --repeat 3 --shapes 1d", ("linux",),
    ),
    "ghost_step": Benchmark(
        f"{GHOST} step --threads 1 --ghosts 32 --repeat 5",
        "A training step with Ghost BN, against BatchNorm", 1.1,
        f"{GHOST} step --threads 1 --ghosts 32 --repeat 1 --models mlp",
    ),
    "ghost_compile": Benchmark(
        f"{GHOST} compile --threads 1 --ghosts 32 --shapes 1d --repeat 5",
        "The same under `torch.compile`", 0.3,
        f"{GHOST} compile --threads 1 --ghosts 1024 --shapes 1d --repeat 1", ("compiler",),
    ),
    "ghost_memory": Benchmark(
        f"{GHOST} memory --ghosts 32 --shapes 16x16",
        "Highest memory of Ghost BN", 0.6,
        f"{GHOST} memory --ghosts 1024 --shapes 16x16", ("linux",),
    ),
    "ghost_limit": Benchmark(
        f"{GHOST} limit --threads 1 --ghosts 32 128 --shapes 1d --repeat 5",
        "The passes over memory that Ghost BN cannot do without", 0.1,
        f"{GHOST} limit --threads 1 --ghosts 128 --shapes 1d --repeat 1",
    ),
    "ghost_convert": Benchmark(
        f"{GHOST} convert", "Converting a ResNet-50", 0.1, f"{GHOST} convert --repeat 2",
    ),
    "ghost_gpu": Benchmark(
        f"{GHOST} op --device cuda --threads 1 --ghosts 32 128",
        "Ghost BN on ResNet-50's layers, on a GPU", 1, f"{GHOST} op --device cuda --threads 1 --ghosts 128 --repeat 2",
        ("cuda",),
    ),
    "ghost_gpu_compile": Benchmark(
        f"{GHOST} compile --device cuda --threads 1 --ghosts 32 128",
        "The same under `torch.compile`, on a GPU", 3,
        f"{GHOST} compile --device cuda --threads 1 --ghosts 128 --repeat 2", ("cuda", "compiler"),
    ),
    "regime": Benchmark(
        "regime_overhead.py --updates 8 --turns 3",
        "`LargeBatchRegime` and `GradientNoiseScale`, beside an update of ResNet-18", 1,
        "regime_overhead.py --updates 3 --turns 1",
    ),
    "diffusion": Benchmark(
        "diffusion_overhead.py --steps 12",
        "`UltraSlowDiffusion` in 10,000 updates of ResNet-18", 0.4, "diffusion_overhead.py --steps 3 --batch-size 2",
    ),
    "distance": Benchmark(
        "diffusion_distance.py --repeats 40",
        "One distance of the weights, against reading them once", 0.3, "diffusion_distance.py --repeats 1",
    ),
    "engine_ott": Benchmark(
        "transport_engine.py --sizes 256 1024 --seconds 1",
        "Value and gradient of a Monge gap, against OTT-JAX", 2.2,
        "transport_engine.py --sizes 64 --dims 2 --shares 0.1 --seconds 0.05", ("peers",),
    ),
    "engine_geomloss": Benchmark(
        "transport_engine.py --peer geomloss --sizes 512 --dims 2 --seconds 1",
        "Value and gradient of a Monge gap, against GeomLoss", 1.7,
        "transport_engine.py --peer geomloss --sizes 64 --dims 2 --shares 0.1 --seconds 0.05",
    ),
    "engine_pot": Benchmark(
        "transport_engine.py --peer pot --sizes 256 1024 --dims 2 --seconds 1",
        "Value and gradient of a Monge gap, against POT", 1,
        "transport_engine.py --peer pot --sizes 64 --dims 2 --shares 0.1 --seconds 0.05", ("peers",),
    ),
    "training": Benchmark(
        "transport_training.py --threads 1 --iterations 120 --batches 256 1024 --gaps l2 l22",
        "A training step of a map, against OTT-JAX's estimator", 2,
        "transport_training.py --threads 1 --iterations 4 --block 2 --batches 64 --gaps l22", ("peers",),
    ),
    "equal_quality_moons": Benchmark(
        "map_to_equal_quality.py moons --peers PEERS",
        "`MongeMap` and OTT-JAX's estimator to equal quality, like for like", 1.8,
        "map_to_equal_quality.py moons --peers PEERS --seeds 0 --steps 4 --every 2", ("peers",),
    ),
    "equal_quality_w2": Benchmark(
        "map_to_equal_quality.py w2 --dims 8 --limit 120 --peers PEERS --data DATA",
        "The same on the Wasserstein-2 benchmark, each side's recipe", 4.8,
        "map_to_equal_quality.py w2 --dims 2 --seeds 0 --steps 2 --every 1 --peers PEERS --data DATA",
        ("peers", "data"),
    ),
    "shell": Benchmark(
        "map_training_shell.py step --steps 100",
        "`MongeMap` under the Trainer, against a plain loop", 0.6,
        "map_training_shell.py step --batches 32:2 --steps 30",
    ),
    "large_step": Benchmark(
        "map_training_shell.py large --batches 4096:2 16384:2",
        "One step on a large batch: seconds and memory", 0.5, "map_training_shell.py large --batches 128:2",
    ),
    "maps": Benchmark(
        "map_cost.py", "What each map costs, against a residual network", 0.2, "map_cost.py --repeats 2 --batch 16",
    ),
    "command": Benchmark(
        "transport_command.py --rows 1_000_000 --threads 1",
        "`lightning-gap transport`, against the bare network", 0.7,
        "transport_command.py --rows 2000 --repeats 1 --threads 1",
    ),
    "scale": Benchmark(
        "transport_scale.py --solvers dense blocked --sizes 1000 3000 10000 30000 --dims 2 --limit 100",
        "Time and memory against n: our dense and blocked solvers", 1.7,
        "transport_scale.py --solvers dense --sizes 100 --dims 2",
    ),
    "scale_keops": Benchmark(
        "transport_scale.py --solvers online --sizes 1000 3000 --dims 2 --limit 100",
        "Time and memory against n: GeomLoss on KeOps", 0.4,
        "transport_scale.py --solvers online --sizes 400 --dims 2", ("compiler",),
    ),
    "scale_million": Benchmark(
        "transport_scale.py --solvers multiscale --sizes 10000 100000 1000000 --dims 2 --limit 300",
        "Time and memory to n = 10⁶: GeomLoss's multiscale solver on KeOps", 1.7,
        "transport_scale.py --solvers multiscale --sizes 400 --dims 2", ("compiler",),
    ),
    "scale_passes": Benchmark(
        "transport_scale.py --pass-rows 500 --sizes 10000 100000 1000000",
        "One pass over n² pairs, to n = 10⁶: our blocks against KeOps", 1,
        "transport_scale.py --pass-rows 20 --sizes 1000 --dims 2", ("compiler",),
    ),
}  # fmt: skip
SCIENCE = {
    "gap_gradient": Benchmark(
        "gap_gradient.py gradient", "How exact the gap's gradient is", 1, page="../transport.md", rows=False
    ),
    "schedules": Benchmark(
        "regime_idioms.py",
        "Where a schedule's length comes from, under the regime", 8, page="../schedules.md", rows=False,
    ),
    "laws": Benchmark(
        "diffusion_laws.py", "How often the right law of diffusion is found", 15, page="../diffusion.md", rows=False
    ),
    "mnist": Benchmark(
        "diffusion_mnist.py --data DATA/mnist_full.npz --results OUTPUT.jsonl",
        "Figure 2 of the paper, F1 on MNIST", 300, needs=("data",), page="../diffusion.md", rows=False,
    ),
    "processes": Benchmark(
        "map_training_shell.py ddp", "Losses of several processes, against one", 2, page="../monge_map.md"
    ),
    "epsilon_lambda": Benchmark(
        "epsilon_lambda.py", "What ε and λ do to a map", 15, page="../howto_epsilon_lambda.md", rows=False
    ),
    "structured": Benchmark(
        "structured_maps.py --steps 300", "Structured maps against a free one", 60, page="../maps.md", rows=False
    ),
    "cells": Benchmark(
        "map_real_data.py --data DATA", "Maps of real cells", 60, needs=("data",), page="../real_cells.md", rows=False
    ),
    "known_maps": Benchmark(
        "transport_maps.py w2 gaussians line sphere --data DATA",
        "Learned maps against known ones", 120, needs=("data",), page="../transport_maps.md", rows=False,
    ),
}  # fmt: skip


def sources(script: str) -> str:
    """Return a hash of a benchmark's code, of what it imports from this folder or shares, and of the package."""
    found, left = set(), {FOLDER / script}
    while left:
        path = left.pop()
        found.add(path)
        names = re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        near = {folder / f"{name}.py" for name in names for folder in (FOLDER, REPRODUCTIONS / "monge_gap")}
        left |= {file for file in near if file.exists()} - found
    digest = hashlib.sha256()
    for path in sorted(found | set((ROOT / "lightning_gap").rglob("*.py"))):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """Describe this machine in words, without its name."""
    import torch

    described: dict[str, Any] = {
        "cpu": processor(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory_GB"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9)
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def versions(python: str) -> dict[str, str]:
    """Return the versions of what a Python computes with."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        f"found = {{name: version(name) for name in {VERSIONS!r}}}\n"
        "print(json.dumps({'Python': platform.python_version()} | {k: v for k, v in found.items() if v}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def busy() -> float | None:
    """Return the seconds that all cores have worked for others than the processes that this one has waited for."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    mine = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return worked - mine.ru_utime - mine.ru_stime


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


def command(arguments: str) -> str:
    """Return the command line as a log and the page show it."""
    return f"python benchmarks/{arguments}"


def read(logs: Path) -> dict[str, dict[str, Any]]:
    """Return the logs by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(logs.glob("*.json"))}


def run_one(name: str, benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    """Run a benchmark, and return its log."""
    arguments = benchmark.line(options.quick)
    given = {"PEERS": options.peers, "DATA": options.data, "OUTPUT": options.logs / name}
    words = shlex.split(arguments)
    handed = [re.sub("PEERS|DATA|OUTPUT", lambda found: str(given[found[0]]), word) for word in words]
    python = options.peers if "peers" in benchmark.needs and "PEERS" not in words else sys.executable
    environment = dict(os.environ) | {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        line = [str(python), str(FOLDER / handed[0]), *handed[1:], *(["--json", str(file)] if benchmark.rows else [])]
        before, others, start = os.getloadavg()[0], busy(), time.perf_counter()
        done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment)
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
    text = json.dumps(log, ensure_ascii=False, indent=1)
    for path, shown in hidden.items():
        if path not in ("None", "/"):
            text = text.replace(path, shown)
    return json.loads(text)


def run(options: argparse.Namespace) -> int:
    """Run what is asked for and has no log yet; return how many failed."""
    chosen = SCIENCE if options.science else SPEED
    names = options.only or list(chosen)
    known, failed = read(options.logs), 0
    options.logs.mkdir(parents=True, exist_ok=True)
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
        file = options.logs / f"{name}.json"
        file.write_text(json.dumps(log, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"{log['seconds']:.0f} s, others took {log['others_cores']} cores", flush=True)
    return failed


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
    parser.add_argument("--logs", type=lambda text: Path(text).resolve(), default=LOGS)
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
        print(f"{options.page.name}: {', '.join(changed) or 'nothing'} changed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
