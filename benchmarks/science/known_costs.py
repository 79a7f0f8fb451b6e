"""Learned maps against known ones, for costs other than the squared one.

    python -m benchmarks.science.known_costs [--costs euclidean pnorm(p=1.5)] [--dims 2 8 32] [--seeds 0 1 2]

The pairs are those of ``known_pairs.py``, made by the seed: 16384 samples of each side, and 4096 others with their true
images. Every map is trained by ``Trainer``, ``MongeMap`` and ``SamplesDataModule`` on one thread for ``--seconds`` of
CPU time, its start included, or for the updates of its recipe:

- ``free``: a residual perceptron, Sinkhorn divergence, no gap; ``gap``: the same with the gap.
- ``plan``: a residual perceptron that starts at an entropic plan for the cost, and is finished by the minibatch energy
  distance, without a gap.
- ``default``: ``MongeMap(cost=...)`` as it is.

Figures: L2-UVP, 100 E|T - T*|² / Var(ν); the cosine of displacements; and the exact gap over 2048 test samples, in % of
what the true map pays. For the Euclidean cost, T* is the map that keeps the order on each ray.
"""

import argparse
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.logs import RESULTS, put
from benchmarks.science.known_pairs import KnownPair, displaced, rays
from benchmarks.science.transport_maps import against_truth, silent_trainer, warm_cosine
from lightning_gap import MongeMap, SamplesDataModule, monge_gap
from lightning_gap.monge import ResidualMLP, minibatch_energy_distance
from lightning_gap.monge.ot.costs import resolve

__all__ = ["MODELS", "figures", "pair_of"]

FINISH, BATCH = 150, 1024
FIGURES = {"uvp": "L2-UVP, %", "cosine": "cosine", "gap": "gap, %", "seconds": "CPU s"}


def _from_plan(dim: int, cost: str) -> MongeMap:
    return MongeMap(
        map=ResidualMLP(dim, start="plan", plan_relative_epsilon=0.01, plan_steps=1500),
        cost=cost,
        fitting_loss=partial(minibatch_energy_distance, relative_epsilon=0.05),
        gap_weight=0,
        optimizer=partial(Adam, lr=3e-4),
        lr_scheduler=partial(LambdaLR, lr_lambda=partial(warm_cosine, updates=FINISH, warm=20)),
    )


def _free(dim: int, cost: str, gap_weight: float) -> MongeMap:
    # What MongeMap took before it chose by the data: named here, so that the comparison stays what it is.
    return MongeMap(
        map=ResidualMLP(dim),
        cost=cost,
        fitting_loss="sinkhorn",
        gap_weight=gap_weight,
        optimizer=partial(Adam, lr=1e-3),
    )


# A model, its batch (``None`` for the data module's own), and its updates (``None``: until the time is over).
MODELS: dict[str, tuple[Callable[[int, str], MongeMap], int | None, int | None]] = {
    "free": (partial(_free, gap_weight=0.0), 256, None),
    "gap": (partial(_free, gap_weight=1.0), 256, None),
    "plan": (_from_plan, BATCH, FINISH),
    "default": (lambda dim, cost: MongeMap(dim=dim, cost=cost), None, None),
}


def pair_of(cost: str, dim: int, seed: int, n: int = 16_384) -> KnownPair:
    """Return samples of both measures, and the optimal map for the cost at others."""
    return rays(dim, n, seed) if str(resolve(cost)) == "euclidean" else displaced(dim, cost, n, seed)


class UntilTime(Callback):
    """Stops a fit after so many CPU seconds, and tells how many it took."""

    def __init__(self, seconds: float) -> None:
        self.limit, self.seconds = seconds, 0.0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Start the clock."""
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Look at the clock."""
        trainer.should_stop = trainer.should_stop or time.process_time() - self.start > self.limit

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self.seconds = time.process_time() - self.start


def figures(pair: KnownPair, mapped: Tensor, rows: int = 2048) -> dict[str, float]:
    """Return error, cosine and gap of the images of the test samples."""
    x = pair.x[:rows].double()
    gap = float(monge_gap(x, mapped[:rows].double(), cost=pair.cost, solver="exact"))
    paid = float(pair.cost.paired(x, pair.true[:rows].double()).mean())
    return {**against_truth(pair.x, mapped, pair.true, pair.variance), "gap": 100 * gap / paid}


def trained(method: str, pair: KnownPair, cost: str, seed: int, seconds: float) -> dict[str, float]:
    """Train a map, and return its figures, updates and CPU seconds."""
    make, batch, updates = MODELS[method]
    seed_everything(seed, verbose=False)
    model, clock = make(pair.x.shape[1], cost), UntilTime(seconds)
    trainer = silent_trainer(max_epochs=-1, max_steps=-1 if updates is None else updates, callbacks=[clock])
    trainer.fit(model, SamplesDataModule(pair.source, pair.target, batch_size=batch, val_fraction=0, seed=seed))
    return {"updates": trainer.global_step, **figures(pair, model.transport(pair.x)), "seconds": clock.seconds}


def table(rows: list[dict[str, Any]]) -> Table:
    """Return medians over the seeds, with the range."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cost"], row["D"], row["map"]), []).append(row)
    result = Table(title="medians (ranges) over the seeds")
    for name in ("cost", "D", "map", "seeds", *FIGURES.values()):
        result.add_column(name, justify="right")
    for group, found in groups.items():
        values = [[row[name] for row in found if name in row] for name in FIGURES]
        cells = [f"{statistics.median(v):.3g} ({min(v):.3g} to {max(v):.3g})" if v else "" for v in values]
        result.add_row(*map(str, group), str(len(found)), *cells)
    return result


def same_run(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two rows are of the same pair, map and seed."""
    return all(row.get(key) == other.get(key) for key in ("cost", "D", "map", "seed", "budget"))


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", nargs="+", default=["euclidean", "pnorm(p=1.5)"])
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--maps", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--samples", type=int, default=16_384)
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds of each fit")
    parser.add_argument("--out", type=Path, default=RESULTS / "known_costs.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    console, rows = Console(width=140), []
    for cost in args.costs:
        for dim in args.dims:
            for seed in args.seeds:
                pair = pair_of(cost, dim, seed, args.samples)
                for name in ("identity", *args.maps):
                    row: dict[str, Any] = {"cost": cost, "D": dim, "map": name, "seed": seed, "samples": args.samples}
                    if name == "identity":
                        row |= figures(pair, pair.x)
                    else:
                        row |= {"budget": args.seconds, **trained(name, pair, cost, seed, args.seconds)}
                    rows.append(row)
                    console.print(
                        " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
                    )
                    put(args.out, row, partial(same_run, row))
    console.print(table(rows))


if __name__ == "__main__":
    main()
