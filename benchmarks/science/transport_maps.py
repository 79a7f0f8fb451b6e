"""Learned maps against known ones.

    python -m benchmarks.science.transport_maps w2 [--data FOLDER] [--dims 2 4 8 16 32] [--seeds 0 1 2]
    python -m benchmarks.science.transport_maps gaussians | line | sphere

Every map is trained by ``Trainer``, ``MongeMap`` and ``SamplesDataModule``, on one thread; seconds are the process's
CPU time in ``Trainer.fit``, start and all, so that they hold on a shared machine. Rows are appended to ``--out`` as
they come.

``w2``: the Wasserstein-2 benchmark pairs of Korotin et al. 2021 ("Do Neural Optimal Transport Solvers Work?"),
Mix3toMix10, from ``w2_mix3to10_D{D}.npz`` in ``--data``: ``train_x``, ``train_y``, 16384 independent samples of each
measure, and ``test_x``, ``test_map``, 4096 samples with their images under the true map. L2-UVP is
100 E|T - T*|² / Var(ν). The peers' figures are quoted, see ``PUBLISHED``.

``gaussians``: samples of two Gaussians; ``line``: costs |x - y|^p in one dimension; ``sphere``: a dilation of the
sphere along its meridians, turned at random.
"""

import argparse
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.logs import put
from benchmarks.measurements import PUBLISHED
from lightning_gap import MongeMap, SamplesDataModule, monge_gap
from lightning_gap.monge import (
    BrenierMap,
    DisplacementCosine,
    ResidualMLP,
    SphereMap,
    StructuredMap,
    gaussian_map,
    minibatch_energy_distance,
)
from lightning_gap.monge.costs import Geodesic

# OTT-JAX 0.6.0, MongeGapEstimator, a perceptron of widths 128, 128, 128, batch 512, gap weight 1 (10 in the second
# row): 240 s (200 s) on two cores, the same 16384 samples, one seed.
OTT = {"OTT-JAX, λ = 1": {2: 1.5, 8: 6.9, 32: 48.6}, "OTT-JAX, λ = 10": {32: 43.9}}


# One recipe for all dimensions, chosen on other pairs (see docs/transport_maps.md).
HIDDEN, PLAN_EPSILON, PLAN_STEPS = (64, 64, 64), 0.002, 3000
UPDATES, BATCH, LR, SHARE = 400, 1024, 2e-3, 0.02


def warm_cosine(step: int, *, updates: int, warm: int = 100) -> float:
    return min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * min(1.0, step / updates))) / 2


@dataclass(frozen=True)
class HalfSquaredGeodesic(Geodesic):
    """Half of the squared geodesic distance, whose optimal maps are unique."""

    name: ClassVar[str] = "half_squared_geodesic"

    def elementwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return half of the squared angle."""
        return super().elementwise(x, y).square() / 2

    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Return halves of all squared angles."""
        return super().pairwise(x, y).square() / 2


class CPUSeconds(Callback):
    """Measures the CPU time of a fit."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Start the clock."""
        self.start = time.process_time()

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self.seconds = time.process_time() - self.start


def silent_trainer(**options: Any) -> Trainer:
    """Return a trainer on the CPU that writes, shows and validates nothing."""
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(
        accelerator="cpu", limit_val_batches=0, num_sanity_val_steps=0, **dict.fromkeys(shown, False), **options
    )


def fit(model: MongeMap, source: Tensor, target: Tensor, *, batch: int, updates: int, seed: int) -> float:
    """Train a model on all samples; return its CPU seconds."""
    clock = CPUSeconds()
    data = SamplesDataModule(source, target, batch_size=batch, val_fraction=0, seed=seed)
    silent_trainer(max_steps=updates, callbacks=[clock]).fit(model, data)
    return clock.seconds


def against_truth(x: Tensor, mapped: Tensor, true: Tensor, variance: float) -> dict[str, float]:
    """Return L2-UVP in %, for this variance of the target, and the cosine of displacements, in float64."""
    x, mapped, true = x.double(), mapped.double(), true.double()
    cosine = DisplacementCosine()
    cosine.update(x, mapped, true)
    error = float((mapped - true).square().sum(1).mean())
    return {"uvp": 100 * error / variance, "cosine": float(cosine.compute())}


def recipe(dim: int, updates: int) -> MongeMap:
    """Return the model for the benchmark's pairs; the learning rate decays over the updates."""
    return MongeMap(
        map=BrenierMap(dim, HIDDEN, start="plan", plan_relative_epsilon=PLAN_EPSILON, plan_steps=PLAN_STEPS),
        fitting_loss=partial(minibatch_energy_distance, relative_epsilon=SHARE),
        gap_weight=0,
        optimizer=partial(Adam, lr=LR),
        lr_scheduler=partial(LambdaLR, lr_lambda=partial(warm_cosine, updates=updates)),
    )


def w2(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each dimension and seed."""
    for dim in args.dims:
        with np.load(args.data / f"w2_mix3to10_D{dim}.npz") as file:
            z = {name: torch.from_numpy(file[name]) for name in file.files}
        source, target = z["train_x"], z["train_y"]
        variance = float(z["var_out"])
        x, true = z["test_x"], z["test_map"]
        A, b = gaussian_map(source, target)
        yield {"D": dim, "map": "identity", **against_truth(x, x, true, variance)}
        yield {"D": dim, "map": "Gaussian", **against_truth(x, x.double() @ A + b, true, variance)}
        for seed in args.seeds:
            seed_everything(seed, verbose=False)
            updates = args.updates or UPDATES
            model = recipe(dim, updates)
            seconds = fit(model, source, target, batch=BATCH, updates=updates, seed=seed)
            found = against_truth(x, model.transport(x), true, variance)
            yield {"D": dim, "map": "BrenierMap", "seed": seed, "updates": updates, "seconds": seconds, **found}


def gaussians(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each dimension, map and seed: L2-UVP of maps between Gaussians."""
    for dim in args.dims:
        for seed in args.seeds:
            # The samples' own moments give the closed form: what is learned can only come near it.
            rng = np.random.default_rng(seed)
            roots = [rng.normal(size=(dim, dim)) / math.sqrt(dim) + 0.5 * np.eye(dim) for _ in range(2)]
            m = [rng.normal(size=dim) for _ in range(2)]
            x, y = (
                torch.from_numpy(rng.normal(size=(16384, dim)) @ L.T + mean) for L, mean in zip(roots, m, strict=True)
            )
            # The truth is that of the covariances themselves, not of the samples'.
            A = optimal_matrix(roots[0] @ roots[0].T, roots[1] @ roots[1].T)
            test = torch.from_numpy(rng.normal(size=(4096, dim)) @ roots[0].T + m[0])
            true = (test - torch.from_numpy(m[0])) @ torch.from_numpy(A) + torch.from_numpy(m[1])
            variance = float(np.trace(roots[1] @ roots[1].T))
            closed, offset = gaussian_map(x, y)
            yield {"D": dim, "map": "gaussian_map", "seed": seed} | against_truth(
                test, test @ closed + offset, true, variance
            )
            unbiased = partial(minibatch_energy_distance, relative_epsilon=0.5)
            for name, net, loss, gap_weight, lr in (
                ("ResidualMLP, Gaussian start, Sinkhorn", ResidualMLP(dim, start="gaussian"), "sinkhorn", 1, 1e-3),
                ("ResidualMLP, Gaussian start, unbiased", ResidualMLP(dim, start="gaussian"), unbiased, 0.1, 1e-4),
                ("BrenierMap, Sinkhorn", BrenierMap(dim), "sinkhorn", 0, 1e-2),
            ):
                seed_everything(seed, verbose=False)
                updates = args.updates or 150
                model = MongeMap(
                    map=net,
                    fitting_loss=loss,
                    gap_weight=gap_weight,
                    optimizer=partial(Adam, lr=lr),
                    lr_scheduler=partial(LambdaLR, lr_lambda=partial(warm_cosine, updates=updates)),
                )
                seconds = fit(model, x.float(), y.float(), batch=1024, updates=updates, seed=seed)
                found = against_truth(test, model.transport(test), true, variance)
                yield {"D": dim, "map": name, "seed": seed, "updates": updates, "seconds": seconds, **found}


def optimal_matrix(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the matrix of the optimal map between centered Gaussians of these covariances."""

    def power(S: np.ndarray, exponent: float) -> np.ndarray:
        values, vectors = np.linalg.eigh(S)
        return (vectors * values**exponent) @ vectors.T

    root, inverse = power(source, 0.5), power(source, -0.5)
    return inverse @ power(root @ target @ root, 0.5) @ inverse


def line(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each exponent and seed: the largest error of a map of the line, in % of the target's range."""

    def true_map(x: Tensor) -> Tensor:
        return 2 + x + torch.sin(2 * math.pi * x) / 8

    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
    for p in (1.5, 2.0, 3.0):
        for seed in args.seeds:
            seed_everything(seed, verbose=False)
            x, y = torch.rand(131_072, 1), true_map(torch.rand(131_072, 1))
            for name, net in (
                ("ResidualMLP", ResidualMLP(1, start="mean")),
                ("StructuredMap", StructuredMap(1, f"pnorm(p={p:g})", start="mean")),
            ):
                updates = args.updates or 800
                model = MongeMap(
                    map=net,
                    cost=f"pnorm(p={p:g})",
                    # The entropic gap pushes images apart: 2 % of the range at weight 1.
                    gap_weight=0.1,
                    relative_fitting_epsilon=0.005,
                    optimizer=partial(Adam, lr=1e-2),
                    lr_scheduler=partial(LambdaLR, lr_lambda=partial(warm_cosine, updates=updates)),
                )
                seconds = fit(model, x, y, batch=512, updates=updates, seed=seed)
                error = float((model.transport(grid) - true_map(grid)).abs().max())
                yield {
                    "p": p, "map": name, "seed": seed, "updates": updates, "seconds": seconds, "sup": 100 * error,
                }  # fmt: skip


def sphere(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each seed: a map along meridians, which is optimal for every increasing cost of the distance.

    (A rotation is not: its displacements are no gradient, and neighbours at different latitudes would exchange their
    images.)
    """
    for seed in args.seeds:
        seed_everything(seed, verbose=False)
        axes = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]

        def true_map(x: Tensor, axes: Tensor = axes) -> Tensor:
            # The stereographic projection from the south pole, scaled by 1/2.
            u = x.double() @ axes
            plane = u[:, :2] / (1 + u[:, 2:]) / 2
            square = plane.square().sum(1, keepdim=True)
            return torch.cat([2 * plane, 1 - square], dim=1) / (1 + square) @ axes.T

        def points(n: int, axes: Tensor = axes) -> Tensor:
            # Uniform but for a cap around the south pole, where the map has no limit.
            u = torch.nn.functional.normalize(torch.randn(2 * n, 3, dtype=torch.float64), dim=1)
            return u[u[:, 2] > -0.8][:n] @ axes.T

        x, y, test = points(8192), true_map(points(8192)), points(2048)
        true = true_map(test)
        for name, gap_weight in (("no gap", 0.0), ("gap", 1.0)):
            seed_everything(seed, verbose=False)
            updates = args.updates or 600
            model = MongeMap(
                map=SphereMap(3),
                cost=HalfSquaredGeodesic(),
                gap_weight=gap_weight,
                relative_fitting_epsilon=0.01,
                optimizer=partial(Adam, lr=2e-3),
                lr_scheduler=partial(LambdaLR, lr_lambda=partial(warm_cosine, updates=updates)),
            )
            seconds = fit(model, x.float(), y.float(), batch=512, updates=updates, seed=seed)
            mapped = model.transport(test).double()
            angle = Geodesic()
            error, moved = angle.elementwise(mapped, true).mean(), angle.elementwise(test, true).mean()
            gap = monge_gap(test, mapped, cost=HalfSquaredGeodesic(), solver="exact")
            yield {
                "map": f"SphereMap, {name}", "seed": seed, "updates": updates, "seconds": seconds,
                "error": 100 * float(error / moved), "gap": float(gap),
            }  # fmt: skip


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "w2": w2, "gaussians": gaussians, "line": line, "sphere": sphere,
}  # fmt: skip
FIGURES = {"uvp": "L2-UVP, %", "cosine": "cosine", "sup": "sup error, % of range", "error": "error, %", "gap": "gap"}


def table(section: str, rows: list[dict[str, Any]]) -> Table:
    """Return medians over the seeds, with the range."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    keys = [key for key in ("D", "p", "map") if any(key in row for row in rows)]
    figures = [name for name in FIGURES if any(name in row for row in rows)]
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    result = Table(title=f"{section}: medians (ranges) over the seeds")
    for name in (*keys, "seeds", "updates", "CPU s", *(FIGURES[name] for name in figures)):
        result.add_column(name, justify="right")
    for group, found in groups.items():
        spent = [row["seconds"] for row in found if "seconds" in row]
        cells = [
            f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"
            for values in ([row[name] for row in found] for name in figures)
        ]
        updates = str(found[0].get("updates", ""))
        seconds = f"{statistics.median(spent):.0f}" if spent else ""
        result.add_row(*map(str, group), str(len(found)), updates, seconds, *cells)
    return result


def keep(path: Path, row: dict[str, Any]) -> None:
    """Write a row to a file of JSON lines, in the place of what an earlier run of the same found."""

    def of_run(row: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in row.items() if k not in {*FIGURES, "seconds"}}

    put(path, row, lambda known: of_run(known) == of_run(row))


def main() -> None:
    """Train, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIGHTNING_GAP_DATA", "data")))
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, help="updates of the training")
    parser.add_argument("--out", type=Path, help="keep the rows in this file of JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    console = Console(width=140)
    for section in args.sections:
        rows = []
        for row in SECTIONS[section](args):
            rows.append(row)
            console.print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
            if args.out:
                keep(args.out, {"section": section, **row})
        console.print(table(section, rows))
        if section == "w2":
            for name, figures in (OTT | PUBLISHED).items():
                console.print(name, *(f"D={dim}: {value}" for dim, value in figures.items() if dim in args.dims))


if __name__ == "__main__":
    main()
