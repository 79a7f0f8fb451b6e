"""The default map, and the best one on fresh samples, on the Wasserstein-2 benchmark's pairs Mix3toMix10.

    python -m benchmarks.science.w2_maps default --data FOLDER
    python -m benchmarks.science.w2_maps fresh --data FOLDER --networks FOLDER

``default``: ``MongeMap()`` and nothing more, by ``Trainer(max_steps=400)`` on the 16384 samples of each side in
``w2_mix3to10_D{D}.npz``. ``quick``: a plan of 4096 of them, a fit of 300 steps, no finish. ``fresh``: a
:class:`BrenierMap` with a longer finish by the semi-dual, on 131072 fresh samples of each side, which
:mod:`benchmarks.science.w2_pairs` draws; the file of the pairs gives the test, and shift and scale of the true map.
L2-UVP is 100 E|T - T*|² / Var(ν) on the 4096 test samples. One thread; seconds are CPU seconds of ``Trainer.fit``,
start and all.

Rows go to ``--out``: solver, pairs, dim, seed, uvp, cosine, cpu_seconds, budget, config.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.logs import put
from benchmarks.science.transport_maps import against_truth
from benchmarks.science.w2_pairs import Mix3ToMix10
from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import BrenierMap

UPDATES = 400
FRESH_SAMPLES, FRESH_STEPS, FRESH_UPDATES, FRESH_BATCH = 2**17, 4000, 100, 1024
SOLVERS = {
    "default": "lightning_gap, default",
    "quick": "lightning_gap, plan of 4096 samples",
    "fresh": "lightning_gap, best on fresh samples",
}


def load(folder: Path, dim: int) -> dict[str, Tensor]:
    """Return the arrays of a pair."""
    with np.load(folder / f"w2_mix3to10_D{dim}.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def fit(model: MongeMap, data: SamplesDataModule, updates: int) -> float:
    """Train, and return the CPU seconds."""
    begun = time.process_time()
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(max_steps=updates, max_epochs=-1, accelerator="cpu", **dict.fromkeys(shown, False))
    trainer.fit(model, data)
    return time.process_time() - begun


def row(args: argparse.Namespace, method: str, dim: int, seed: int) -> dict[str, Any]:
    """Return what a method finds on a pair."""
    z = load(args.data, dim)
    seed_everything(seed, verbose=False)
    if method in ("default", "quick"):
        source, target, quick = z["train_x"], z["train_y"], method == "quick"
        updates = 1 if quick else UPDATES
        options = {"plan_samples": 4096, "plan_steps": 300, "finish_steps": 0} if quick else {}
        model = MongeMap(map=BrenierMap(dim, **options) if quick else None)
        data = SamplesDataModule(source, target, seed=seed)
        config: dict[str, Any] = {"samples": len(source), "updates": updates, **options}
    else:
        pair = Mix3ToMix10(args.networks, dim, (z["test_x"], z["test_map"]))
        source = pair.source(FRESH_SAMPLES, seed=10 * seed + 1)
        target = pair.target(FRESH_SAMPLES, seed=10 * seed + 2)
        model = MongeMap(map=BrenierMap(dim, args.hidden, finish_steps=args.steps))
        data, updates = (
            SamplesDataModule(source, target, batch_size=FRESH_BATCH, val_fraction=0, seed=seed),
            FRESH_UPDATES,
        )
        config = {"samples": FRESH_SAMPLES, "updates": updates, "finish_steps": args.steps, "hidden": list(args.hidden)}
    begun = time.perf_counter()
    seconds = fit(model, data, updates)
    wall = time.perf_counter() - begun
    found = against_truth(z["test_x"], model.transport(z["test_x"]), z["test_map"], float(z["var_out"]))
    return {
        "solver": SOLVERS[method], "pairs": "w2", "dim": dim, "seed": seed, **found,
        "cpu_seconds": round(seconds, 1), "wall_seconds": round(wall, 1),
        "budget": 600 if method == "fresh" else 120, "config": config,
        **({"curve": [[round(seconds, 1), round(wall, 1), found["uvp"]]]} if method == "quick" else {}),
    }  # fmt: skip


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=SOLVERS)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIGHTNING_GAP_DATA", "data")))
    parser.add_argument("--networks", type=Path, help="folder of the benchmark's networks, for fresh samples")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=FRESH_STEPS, help="steps of the finish on fresh samples")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64, 64])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/known_maps.jsonl"))
    args = parser.parse_args()
    if "fresh" in args.methods and args.networks is None:
        parser.error("fresh samples need --networks, the folder of the benchmark's networks")
    torch.set_num_threads(1)
    keys, found = ("solver", "pairs", "dim", "seed"), []
    for method in args.methods:
        for dim in args.dims:
            for seed in args.seeds:
                one = row(args, method, dim, seed)
                found.append(one)
                Console().print(one)
                put(args.out, one, lambda known, one=one: all(known.get(key) == one[key] for key in keys))
    shown = Table(title="L2-UVP in %, median (range) over the seeds")
    for name in ("solver", "D", "seeds", "L2-UVP", "cosine", "CPU s"):
        shown.add_column(name, justify="right")
    for solver, dim in sorted({(one["solver"], one["dim"]) for one in found}):
        rows = [one for one in found if (one["solver"], one["dim"]) == (solver, dim)]
        uvp = [one["uvp"] for one in rows]
        shown.add_row(
            solver, str(dim), str(len(rows)), f"{statistics.median(uvp):.3g} ({min(uvp):.3g} to {max(uvp):.3g})",
            f"{statistics.median(one['cosine'] for one in rows):.4f}",
            f"{statistics.median(one['cpu_seconds'] for one in rows):.0f}",
        )  # fmt: skip
    Console().print(shown)


if __name__ == "__main__":
    main()
