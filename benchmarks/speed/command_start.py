"""What the command line takes before it does anything, each command in a process of its own.

    python -m benchmarks.speed.command_start

``fit --help`` for the first time is that of an empty ``XDG_CACHE_HOME``; then it is kept. ``plan`` is that of a large
batch, from numbers alone. For comparison, Python itself, and the import of Lightning. The commands take turns.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measurements import Row, add_json, spread, write_rows

PLAN = "plan --batch-size 2048 --reference-batch-size 256 --samples 50000 --epochs 90 --lr 0.1 --milestones 30,60,80"
COMMANDS = {
    "python": ["-c", "pass"],
    "import lightning.pytorch": ["-c", "import lightning.pytorch"],
    "--version": ["-m", "lightning_gap", "--version"],
    "plan": ["-m", "lightning_gap", *PLAN.split()],
    "fit --help, first": ["-m", "lightning_gap", "fit", "--help"],
    "fit --help": ["-m", "lightning_gap", "fit", "--help"],
}


def seconds(command: list[str], cache: Path) -> tuple[float, float]:
    """Return the wall and the processor's seconds of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([sys.executable, *command], env=environment, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    add_json(parser)
    args = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kept")
        seconds(COMMANDS["fit --help"], kept)
        for turn in range(args.repeats):
            for name, command in COMMANDS.items():
                cache = Path(folder, f"empty-{turn}") if name.endswith("first") else kept
                times[name].append(seconds(command, cache))
    rows: list[Row] = [
        {
            "command": name,
            "wall, s": spread([wall for wall, _ in found]),
            "processor, s": spread([processor for _, processor in found]),
        }
        for name, found in times.items()
    ]
    for row in rows:
        print(row["command"], *(f"{key} {row[key]['median']:.2f}" for key in ("wall, s", "processor, s")))
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
