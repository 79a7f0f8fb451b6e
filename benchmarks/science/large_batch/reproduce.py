"""Run the rows of the tables, one after the other, and keep what was logged.

    python -m benchmarks.science.large_batch.reproduce --data f1_mnist=mnist_full.npz f1_fashion=FOLDER \
        --only f1_mnist f1_fashion --precision bf16-mixed

Runs whose logs are there already are not repeated, one that was interrupted goes on from its last checkpoint, and
several of these commands may share the work. ``results.py`` makes tables and figures of the logs.
"""

import argparse
import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.logs import RESULTS, append, read
from benchmarks.machine import processor
from benchmarks.processes import run_module

HERE, TRAIN = Path(__file__).parent, "benchmarks.science.large_batch.train"
PAPER = ("sb", "lb", "lr", "gbn", "ra")
# A large batch that two CPU cores can train on for as many updates as the small one.
BATCH = ["--data.batch_size", "1024"]
# What is trained: for each network and data, the columns, and for each column further options of train.py.
ADAMW = ["--config", str(HERE / "adamw.yaml")]
FRESH = ["--trainer.callbacks+", "FreshMomentum"]
LAYER = ["--model.network.init_args.normalization", "layer"]
TABLE: dict[str, dict[str, list[str]]] = {
    "f1_mnist": {name: [] for name in (*PAPER, "seesaw", "seesaw_gbn", "seesaw_sqrt")},
    "f1_fashion": {name: [] for name in (*PAPER, "ra4", "ra_no_gbn4", "linear", "linear_warmup", "linear_gbn")}
    | {name: [] for name in ("ghosts", "lr_warmup", "gbn_warmup", "gbn_per_step")}
    | {name: [] for name in ("seesaw", "seesaw_gbn", "seesaw_sqrt", "auto", "auto15")}
    | {f"adamw_{name}": ADAMW for name in ("sb", "lb", "lr", "gbn", "lb512", "rule512", "ra512")}
    | {f"layer_{name}": LAYER for name in ("sb", "lb", "lr", "noise")}
    | {f"fresh_{name}": FRESH for name in ("sb", "lb", "lr", "gbn")}
    | {f"float32_{name}": ["--trainer.precision", "32-true"] for name in ("sb", "gbn")},
    "c1_cifar10_short": {name: [] if name == "sb" else BATCH for name in PAPER}
    | {name: [] for name in ("ramp", "ramp_gbn", "ramp_gbn_ema", "sb_ema")},
    "c1_cifar10": {name: [] for name in PAPER},
    "resnet44_cifar10": {name: [] for name in PAPER},
}
VARIANTS = ("adamw", "layer", "fresh", "float32")
SEEDS = (0, 1, 2)
# What is kept of a run's metrics.csv, and under which name.
KEPT = {
    "epoch": "epoch",
    "step": "step",
    "train_loss": "train_loss",
    "test_loss": "test_loss",
    "test_error": "test_error",
    "lightning_gap/diffusion/updates": "distance_updates",
    "lightning_gap/diffusion/distance": "distance",
    "lightning_gap/diffusion/cosine": "cosine",
    "lightning_gap/diffusion/weight_norm": "weight_norm",
    "lightning_gap/diffusion/learning_rate": "learning_rate",
}


def column_file(column: str) -> Path:
    """Return the configuration of a column, which its variants share."""
    first, _, rest = column.partition("_")
    return HERE / "columns" / f"{rest if first in VARIANTS else column}.yaml"


def wanted(only: list[str]) -> Iterator[tuple[str, str, int]]:
    """Yield network, column and seed of the runs that ``network``, ``network/column``, ... ``/seed`` name."""
    for name in only:
        network, column, seed = (*name.split("/"), "", "")[:3]
        if network not in TABLE or (column and column not in TABLE[network]):
            known = ", ".join(TABLE.get(network, TABLE))
            raise SystemExit(f"--only {name}: there are {known}")
        columns = [column] if column else list(TABLE[network])
        for each, kind in product([int(seed)] if seed else SEEDS, columns):
            yield network, kind, each


def run(network: str, column: str, seed: int, data: Path, runs: Path, logs: Path, options: list[str]) -> None:
    """Train one row, unless it has been trained or another process trains it, and keep its logs."""
    folder, log, key = runs / network / column / str(seed), logs / f"large_batch_{network}.jsonl", (column, seed)
    if any((row["column"], row["seed"]) == key for row in read(log)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / "running"
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        if _alive(lock):
            return
    lock.write_text(str(os.getpid()))
    try:
        parts = _parts(folder)
        command = ["fit", "--config", str(HERE / f"{network}.yaml"), "--config", str(column_file(column))]
        command += ["--seed_everything", str(seed), "--data.path", str(data)]
        command += ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(folder)]
        command += ["--trainer.logger.name", "", "--trainer.logger.version", f"part{len(parts)}"]
        command += options + TABLE[network][column]
        checkpoints = [part / "checkpoints" / "last.ckpt" for part in parts]
        last = next((path for path in reversed(checkpoints) if path.exists()), None)
        if last is not None:
            command += ["--ckpt_path", str(last)]
        started, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            with (folder / f"part{len(parts)}.log").open("w") as output:
                code = run_module(TRAIN, *command, stdout=output, stderr=subprocess.STDOUT).returncode
        finally:
            # An interrupted part has cost as much.
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            cost = {"cpu_seconds": round(cpu, 1), "seconds": round(time.time() - started, 1)}
            with (folder / "cost.jsonl").open("a") as file:
                file.write(json.dumps(cost) + "\n")
        if code:
            raise SystemExit(f"{network} {column} {seed} failed: see {output.name}")
        append(log, {"column": column, "seed": seed} | log_of(folder, options + TABLE[network][column]))
    finally:
        lock.unlink()


def _parts(folder: Path) -> list[Path]:
    """Return the folders of a run's parts, in the order in which they were trained."""
    parts = [path for path in folder.glob("part*") if path.is_dir()]
    return sorted(parts, key=lambda path: int(path.name.removeprefix("part")))


def _alive(lock: Path) -> bool:
    try:
        os.kill(int(lock.read_text() or 0), 0)
    except (ProcessLookupError, ValueError):
        return False
    return True


def log_of(folder: Path, options: list[str]) -> dict[str, Any]:
    """Return what a run cost and ran on, and what its parts logged, column by column."""
    rows: list[dict[str, str]] = []
    # A part that was interrupted before its first log has none.
    for path in filter(Path.exists, (part / "metrics.csv" for part in _parts(folder))):
        with path.open(newline="") as file:
            found = [{new: row[old] for old, new in KEPT.items() if row.get(old)} for row in csv.DictReader(file)]
        # A part that went on from a checkpoint repeats what an interrupted one did after it.
        first = min((int(row["step"]) for row in found), default=0)
        rows = [row for row in rows if int(row["step"]) < first] + found
    rows = [row for row in rows if row.keys() - {"epoch", "step"}]
    import torch

    costs = [json.loads(line) for line in (folder / "cost.jsonl").read_text().splitlines()]
    facts: dict[str, Any] = {name: round(sum(cost[name] for cost in costs), 1) for name in costs[0]}
    facts |= {"parts": len(costs), "threads": torch.get_num_threads(), "torch": torch.__version__}
    facts["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    facts["precision"] = dict(zip(options[::2], options[1::2], strict=False)).get("--trainer.precision", "32-true")
    return facts | {"log": {name: [_short(row.get(name)) for row in rows] for name in KEPT.values()}}


def _short(logged: str | None) -> float | None:
    """Return a number in seven digits, a whole one as such."""
    number = None if logged is None else float(f"{float(logged):.7g}")
    return int(number) if number is not None and number.is_integer() else number


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="NETWORK=PATH")
    parser.add_argument("--only", nargs="+", default=["f1_mnist", "f1_fashion"], metavar="NETWORK[/COLUMN[/SEED]]")
    parser.add_argument("--runs", type=Path, default=Path("runs/large_batch"))
    parser.add_argument("--logs", type=Path, default=RESULTS)
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args()
    data = dict(pair.split("=", 1) for pair in options.data)
    # A run that is told to stop says first what it has cost.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    for network, column, seed in wanted(options.only):
        if network not in data:
            raise SystemExit(f"--data {network}=PATH is missing")
        precision = ["--trainer.precision", options.precision]
        run(network, column, seed, Path(data[network]), options.runs, options.logs, precision)


if __name__ == "__main__":
    main()
