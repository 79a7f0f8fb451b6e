"""Train the rows of the two-dimensional suite, score them, and keep what was found.

    python examples/reproductions/monge_gap/suite.py            # samples, maps, scores
    PEER/bin/python examples/reproductions/monge_gap/ott_peer.py  # the same rows by OTT-JAX, in its own environment
    python examples/reproductions/monge_gap/suite.py            # scores of what is new

Every map is trained by ``lightning-gap fit`` with configurations beside this file, once more with the peer's first
weights, and maps the same test samples as the peer's. Rows whose score is in the log are not repeated. ``results.py``
makes tables and figures.
"""

import argparse
import csv
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from settings import GAPS, LIBRARIES, LOGS, RUNS, SEEDS
from tasks import TASKS, samples

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


def picture(path: Path, found: Path) -> list[list[Any]]:
    """Return some test samples and their images, in four digits."""
    with np.load(path) as file:
        x = file["test_x"][:SHOWN]
    with np.load(found) as file:
        mapped = file["mapped"][:SHOWN]
    return [[f"{value:.4g}" for value in pair] for pair in np.concatenate([x, mapped], axis=1).tolist()]


def read(log: Path) -> list[dict[str, Any]]:
    """Return the rows of a log."""
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []


def append(log: Path, row: dict[str, Any]) -> None:
    """Append a row to a log, numbers in six digits."""
    log.parent.mkdir(parents=True, exist_ok=True)
    short = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(short) + "\n")


def draw_from(runs: Path, logs: Path, tasks: Sequence[str], seed: int) -> None:
    """Keep the displacements of one seed, and some samples of the target, for the figure."""
    with (logs / "displacements.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["task", "gap", "x1", "x2", "image1", "image2"])
        for task in tasks:
            path = runs / task / str(seed) / "samples.npz"
            if not path.exists():
                continue
            with np.load(path) as arrays:
                for a, b in zip(arrays["test_x"][: 2 * SHOWN], arrays["test_y"][: 2 * SHOWN], strict=True):
                    writer.writerow([task, "samples", *(f"{value:.4g}" for value in (*a.tolist(), *b.tolist()))])
            for gap in GAPS:
                found = path.parent / f"lightning_gap_{gap}.npz"
                if found.exists():
                    writer.writerows([[task, gap, *row] for row in picture(path, found)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and score what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--gaps", nargs="+", choices=GAPS, default=list(GAPS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--runs", type=Path, default=RUNS, help="samples, checkpoints and images")
    parser.add_argument("--logs", type=Path, default=LOGS)
    parser.add_argument("options", nargs="*", help="further options of lightning-gap fit, after --")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    log = args.logs / "suite.jsonl"
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
                        append(log, key | score(path, found))
    draw_from(args.runs, args.logs, args.tasks, args.seeds[0])


if __name__ == "__main__":
    main()
