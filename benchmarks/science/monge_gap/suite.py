"""Train the rows of the two-dimensional suite, score them, and keep what was found.

    python -m benchmarks.science.monge_gap.suite            # samples, maps, scores
    PEER/bin/python -m benchmarks.science.monge_gap.ott_peer  # the same rows by OTT-JAX, in its own environment
    python -m benchmarks.science.monge_gap.suite            # scores of what is new

Every map is trained by ``lightning-gap fit`` with configurations beside this file, once more with the peer's first
weights, and maps the same test samples as the peer's. Rows whose score is in the log are not repeated. ``results.py``
makes tables and figures.
"""

import argparse
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from benchmarks.logs import RESULTS, append, read
from benchmarks.measurements import six_digits
from benchmarks.science.monge_gap.settings import GAPS, LIBRARIES, RUNS, SEEDS
from benchmarks.science.monge_gap.tasks import TASKS, samples
from lightning_gap import MongeMap, monge_gap, sinkhorn_divergence
from lightning_gap.cli import main as lightning_gap
from lightning_gap.monge import ResidualMLP
from lightning_gap.monge.costs import resolve

HERE = Path(__file__).parent
COSTS = {"l2": "euclidean", "l22": "sqeuclidean", "p1.5": "pnorm(p=1.5)"}
# What is trained here, after the tutorial's configuration and the gap's by these.
OURS = {"lightning_gap": (), "flax_start": ("flax_start.yaml",)}
# Samples of an exact gap, and displacements of a picture.
EXACT, SHOWN = 1024, 200


def prepare(task: str, seed: int, runs: Path) -> Path:
    """Write the samples of a task and the epsilons of its training, unless they are there."""
    path = runs / task / str(seed) / "samples.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn = samples(task, seed)
        x, y = (torch.from_numpy(drawn[name][:256]) for name in ("train_x", "train_y"))
        squared = resolve("sqeuclidean")
        # As the tutorial has them, of its first batch: the gap's share is of the squared distance for every cost.
        epsilons = {"fitting_epsilon": 0.1 * squared.mean(y, y), "gap_epsilon": 0.01 * squared.mean(x, y)}
        np.savez(path, **drawn, **epsilons)
    return path


def train(path: Path, library: str, gap: str, seed: int, options: Sequence[str] = ()) -> None:
    """Train a map by the command line, and write the images of the test samples and the CPU seconds it took."""
    out = path.parent / f"{library}_{gap}.npz"
    if out.exists():
        return
    with np.load(path) as file:
        test, epsilons = file["test_x"], {name: float(file[name]) for name in ("fitting_epsilon", "gap_epsilon")}
    checkpoint = path.parent / f"{library}_{gap}.ckpt"
    checkpoint.unlink(missing_ok=True)
    configurations = ("tutorial.yaml", f"gaps/{gap}.yaml", *OURS[library])
    words = ["fit", *(word for name in configurations for word in ("--config", str(HERE / name)))]
    words += ["--seed_everything", str(seed), "--data.seed", str(seed)]
    words += ["--data.source", f"{path}::train_x", "--data.target", f"{path}::train_y"]
    words += [word for name, value in epsilons.items() for word in (f"--model.{name}", repr(value))]
    words += ["--trainer.default_root_dir", str(path.parent)]
    words += ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.dirpath", str(path.parent)]
    words += ["--trainer.callbacks.filename", checkpoint.stem]
    started = time.process_time()
    lightning_gap([*words, *options])
    seconds = time.process_time() - started
    # A checkpoint makes networks of this package only, and only first weights tell the others from the tutorial's.
    network = ResidualMLP(**yaml.safe_load((HERE / "tutorial.yaml").read_text("utf-8"))["model"]["map"]["init_args"])
    model = MongeMap.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True, map=network)
    np.savez(out, mapped=model.transport(test).numpy(), seconds=seconds, updates=_updates(checkpoint))


def _updates(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


def score(path: Path, found: Path) -> dict[str, float]:
    """Return divergence and exact gaps of a map's images of the test samples, and what samples of this size allow."""
    with np.load(path) as file:
        x, y = (torch.from_numpy(file[name]) for name in ("test_x", "test_y"))
        epsilon = float(file["fitting_epsilon"])
    with np.load(found) as file:
        mapped = torch.from_numpy(file["mapped"]).float()
        row = {"seconds": float(file["seconds"]), "updates": int(file["updates"])}
    # Always the same regularization for a task and a seed, whatever was trained with.
    row |= {"divergence": _divergence(mapped, y, epsilon), "floor": floor(path)}
    for name, cost in COSTS.items():
        a, b = x[:EXACT].double(), mapped[:EXACT].double()
        row[f"paid_{name}"] = float(resolve(cost).paired(a, b).mean())
        row[f"gap_{name}"] = float(monge_gap(a, b, cost=cost, solver="exact"))
    return row


@cache
def floor(path: Path) -> float:
    """Return the divergence of two sets of samples of the target."""
    with np.load(path) as file:
        other, y = (torch.from_numpy(file[name]) for name in ("other_y", "test_y"))
        return _divergence(other, y, float(file["fitting_epsilon"]))


def _divergence(x: torch.Tensor, y: torch.Tensor, epsilon: float) -> float:
    return float(sinkhorn_divergence(x, y, epsilon=epsilon, tolerance=1e-5, max_iterations=20_000))


def beside(x: NDArray[np.float32], y: NDArray[np.float32]) -> list[list[float]]:
    """Return the samples of two sets side by side, in four digits."""
    return [[float(f"{value:.4g}") for value in pair] for pair in np.concatenate([x, y], axis=1).tolist()]


def draw_from(runs: Path, logs: Path, tasks: Sequence[str], seed: int) -> None:
    """Keep the displacements of one seed, and some samples of the target, for the figure."""
    log = logs / "monge_gap_displacements.jsonl"
    log.unlink(missing_ok=True)
    for task in tasks:
        path = runs / task / str(seed) / "samples.npz"
        if not path.exists():
            continue
        with np.load(path) as arrays:
            x, y = arrays["test_x"][: 2 * SHOWN], arrays["test_y"][: 2 * SHOWN]
        append(log, {"task": task, "gap": "samples", "pairs": beside(x, y)})
        for gap in GAPS:
            found = path.parent / f"lightning_gap_{gap}.npz"
            if found.exists():
                with np.load(found) as arrays:
                    append(log, {"task": task, "gap": gap, "pairs": beside(x[:SHOWN], arrays["mapped"][:SHOWN])})


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and score what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--gaps", nargs="+", choices=GAPS, default=list(GAPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--runs", type=Path, default=RUNS, help="samples, checkpoints and images")
    parser.add_argument("--logs", type=Path, default=RESULTS)
    parser.add_argument("options", nargs="*", help="further options of lightning-gap fit, after --")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    log = args.logs / "monge_gap_suite.jsonl"
    done = {(row["task"], row["gap"], row["seed"], row["library"]) for row in read(log)}
    for seed in args.seeds:
        for task in args.tasks:
            path = prepare(task, seed, args.runs)
            for gap in args.gaps:
                for library in OURS:
                    train(path, library, gap, seed, args.options)
                for library in LIBRARIES:
                    found = path.parent / f"{library}_{gap}.npz"
                    if found.exists() and (task, gap, seed, library) not in done:
                        key = {"task": task, "gap": gap, "seed": seed, "library": library}
                        append(log, six_digits(key | score(path, found)))
    draw_from(args.runs, args.logs, args.tasks, args.seeds[0])


if __name__ == "__main__":
    main()
