"""Peak memory and throughput of ``lightning-gap transport`` on a file of many rows, against the bare network.

Each figure is that of a process of its own. The bare network maps the same rows, by the same batch, from one block in
memory that it goes through again and again: it reads and writes nothing. The processes take turns. On a machine that
others use, trust the rows by seconds of a core, in which all threads count: reading, mapping and writing.

    python -m benchmarks.speed.transport_command --rows 10_000_000
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.measurements import add_json, ratios, spread, write_rows

CODE = """
import resource, sys, time
import torch
from lightning_gap.monge.transport_files import load_map, transport_file
checkpoint, source, output, rows, dim, batch, command = sys.argv[1:]
rows, dim, batch = int(rows), int(dim), int(batch)
torch.set_num_threads({threads})
model = load_map(checkpoint)
idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, cpu = time.perf_counter(), time.process_time()
if command == "transport":
    transport_file(model, source, output, batch_size=batch, overwrite=True)
else:
    x = torch.randn(batch, dim)
    with torch.no_grad():
        for first in range(0, rows, batch):
            model.map(x[: min(batch, rows - first)])
print(time.perf_counter() - start, time.process_time() - cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, idle)
"""


def make_checkpoint(path: Path, dim: int) -> None:
    import numpy as np
    from lightning.pytorch import Trainer

    from lightning_gap import MongeMap, SamplesDataModule

    rng = np.random.default_rng(0)
    data = SamplesDataModule(*(rng.normal(size=(512, dim)).astype("float32") for _ in range(2)), batch_size=128)
    trainer = Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(MongeMap(), data)
    trainer.save_checkpoint(path)


def make_rows(path: Path, rows: int, dim: int) -> None:
    import numpy as np

    block = np.random.default_rng(0).normal(size=(100_000, dim)).astype(np.float32)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, rows, len(block)):
            file.write(block[: min(len(block), rows - first)].data)


def measure(command: str, words: list[str], threads: int) -> tuple[float, float, float, float]:
    """Return seconds, seconds of a core, peak memory and memory before the first row, in MB."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(threads=threads), *words, command],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds, cpu, peak, idle = map(float, done.stdout.split())
    return seconds, cpu, peak / 1024, idle / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: int(text.replace("_", "")), default=1_000_000)
    parser.add_argument("--dim", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add_json(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, source, output = (Path(folder, name) for name in ("map.ckpt", "in.npy", "out.npy"))
        make_checkpoint(checkpoint, options.dim)
        make_rows(source, options.rows, options.dim)
        words = [*map(str, (checkpoint, source, output, options.rows, options.dim, options.batch_size))]
        found: dict[str, list[tuple[float, float, float, float]]] = {"network": [], "transport": []}
        start = time.perf_counter()
        for _ in range(options.repeats):
            for command, runs in found.items():
                runs.append(measure(command, words, options.threads))
        assert output.stat().st_size == source.stat().st_size
    print(f"{options.rows} x {options.dim} float32, batches of {options.batch_size}, {options.threads} threads, "
          f"median of {options.repeats}; {time.perf_counter() - start:.0f} s")  # fmt: skip
    print(
        "| | rows/s | of the network's | rows/s of a core | of the network's | peak memory, MB | before the first row |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    bare, bare_cpu = (median(run[i] for run in found["network"]) for i in (0, 1))
    for command, runs in found.items():
        seconds, cpu = (median(run[i] for run in runs) for i in (0, 1))
        peak, idle = (max(run[i] for run in runs) for i in (2, 3))
        print(f"| {command} | {options.rows / seconds:.0f} | {bare / seconds:.0%} | {options.rows / cpu:.0f} | "
              f"{bare_cpu / cpu:.0%} | {peak:.0f} | {idle:.0f} |")  # fmt: skip
    rows = []
    for command, runs in found.items():
        speeds, bare_speeds = ([options.rows / run[0] for run in side] for side in (runs, found["network"]))
        core_speeds, bare_core = ([options.rows / run[1] for run in side] for side in (runs, found["network"]))
        rows.append({
            "": command, "rows/s": spread(speeds), "of the network's": ratios(speeds, bare_speeds),
            "rows/s of a core": spread(core_speeds), "of its": ratios(core_speeds, bare_core),
            "peak memory, MB": max(run[2] for run in runs), "before the first row, MB": max(run[3] for run in runs),
        })  # fmt: skip
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
