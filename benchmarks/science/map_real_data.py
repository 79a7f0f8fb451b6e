"""Maps from control to treated cells, on cells that no map has seen, against the simple maps that may be enough.

    LIGHTNING_GAP_DATA=FOLDER python -m benchmarks.science.map_real_data [kang sachs] [--seeds 0 1 2] [--only REGEX]
        [--choose]

``kang``: blood cells before and after interferon β (Kang et al. 2018, "Multiplexed droplet single-cell RNA-sequencing
using natural genetic variation"), log counts of 100 genes, learned in 20 principal components. Patient 107 is held out,
cells of the two others are trained on. Needs ``kang_ifnb.npz``: ``logcounts`` (n, 100), ``treated``, ``patient``,
``cell_type``, ``cell_type_names``.

``sachs``: T cells before and after the MEK inhibitor U0126 (Sachs et al. 2005, "Causal protein-signaling networks
derived from multiparameter single-cell data"), logarithms of 11 proteins, each divided by its standard deviation. A
random quarter of the cells is held out, another one for each seed. Needs ``sachs_flow.npz``: ``X_raw`` (n, 11),
``condition``, ``condition_names``.

All maps are fitted to the same training cells in the same coordinates, which are fitted to training cells too. Scores
are those of the images of held-out control cells against held-out treated cells, in double, in these coordinates:

* energy distance, the U-statistic, whose expectation is 0 for equal distributions whatever the numbers of cells, so
  that it may be negative;
* Sinkhorn divergence of squared distances, at 5 % of the mean one within the held-out treated cells;
* Wasserstein-1 distance of each gene's or protein's marginal, decoded to units of the data, mean over these, for all
  cells, and within each cell type and then averaged over cell types;
* exact Monge gaps, an assignment of up to 1000 cells, for the squared distance and the distance, in percent of the mean
  cost of moving.

The floor is as many training treated cells, drawn anew for each seed, in place of the images: cells of other patients
for ``kang``, so a map that keeps what is the patient's own may be below it.

``--choose`` prints the validation by which the options below were chosen, in which the test cells have no part: for
``kang`` patient 1015 is trained on and patient 101 held out, for ``sachs`` a quarter of the training cells. One thread
in each of ``--jobs`` processes, which share the seeds.
"""

import argparse
import logging
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.science.held_out_energy import unbiased_energy_distance
from lightning_gap import MongeMap, SamplesDataModule, monge_gap, sinkhorn_divergence
from lightning_gap.monge import (
    MLP,
    AffineRepresentation,
    ConditionalMap,
    ResidualMLP,
    gaussian_map,
    marginal_wasserstein,
)
from lightning_gap.monge.costs import resolve

Map = Callable[[Tensor, np.ndarray], Tensor]  # of encoded cells and their types


@dataclass(frozen=True)
class Cells:
    """Cells of one population: ``(n, d)`` raw features and the type of each, one and the same where none is known."""

    x: np.ndarray
    types: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Cells":
        return Cells(self.x[rows], self.types[rows])


@dataclass(frozen=True)
class Task:
    """Control and treated cells, to train and to test on, and the coordinates to learn in."""

    control: Cells
    treated: Cells
    test_control: Cells
    test_treated: Cells
    coordinates: dict[str, Any]

    @property
    def typed(self) -> bool:
        """Whether types are known."""
        return len(np.unique(self.control.types)) > 1

    def data(self, by_type: bool = False, seed: int = 0) -> SamplesDataModule:
        """Return the training cells; with ``by_type`` as many of each type in a batch as the smallest type has."""
        conditions = {"conditions": (self.control.types, self.treated.types), "small_conditions": "shrink"}
        return SamplesDataModule(
            self.control.x, self.treated.x, batch_size=256, val_fraction=0.0, seed=seed, **self.coordinates,
            **(conditions if by_type else {}),
        )  # fmt: skip


def kang(folder: Path) -> tuple[Callable[[int], Task], Callable[[int], Task]]:
    """Return what makes the task of a seed, and that of its validation."""
    z = np.load(folder / "kang_ifnb.npz")
    cells = Cells(z["logcounts"].astype(np.float32), z["cell_type_names"][z["cell_type"]])
    treated, patient = z["treated"] == 1, z["patient"]

    def split(train: list[int], test: int) -> Task:
        return Task(
            cells[~treated & np.isin(patient, train)], cells[treated & np.isin(patient, train)],
            cells[~treated & (patient == test)], cells[treated & (patient == test)], {"components": 20},
        )  # fmt: skip

    return lambda seed: split([101, 1015], 107), lambda seed: split([1015], 101)


def sachs(folder: Path) -> tuple[Callable[[int], Task], Callable[[int], Task]]:
    """Return what makes the task of a seed, and that of its validation."""
    z = np.load(folder / "sachs_flow.npz")
    name, x = z["condition_names"][z["condition"]], np.log(z["X_raw"])
    both = [x[np.isin(name, ["cd3cd28", "cd3cd28_icam2"])], x[name == "cd3cd28_u0126"]]
    control, treated = (Cells(part, np.full(len(part), "T cells")) for part in both)

    def split(task: Task | None, seed: int) -> Task:
        draws = np.random.default_rng(seed)
        parts: list[Cells] = []
        for population in (control, treated) if task is None else (task.control, task.treated):
            order = draws.permutation(len(population.x))
            held_out = len(order) // 4
            parts += [population[order[held_out:]], population[order[:held_out]]]
        return Task(parts[0], parts[2], parts[1], parts[3], {"standardize": True})

    return lambda seed: split(None, seed), lambda seed: split(split(None, seed), 1000 + seed)


TASKS = {"kang": kang, "sachs": sachs}


@dataclass(frozen=True)
class Options:
    """How a map is trained."""

    cost: str = "sqeuclidean"
    start: str = "gaussian"  # of a ResidualMLP; "none" for an MLP, "default" for MongeMap() with nothing more
    gap_weight: float = 0.1
    by_type: bool = False
    fitting_loss: str = "energy"
    fitting_epsilon: float = 0.05  # share of the mean cost
    hidden: tuple[int, ...] = (64, 64)
    lr: float = 2e-3
    steps: int = 1000


# By ``--choose``: the lowest energy distance of validation among one network for all cells.
CHOSEN = {"kang": Options(), "sachs": Options()}


def fit(task: Task, options: Options, seed: int) -> Map:
    """Train by a trainer, and return the map of encoded cells."""
    seed_everything(seed, verbose=False)
    data = task.data(options.by_type, seed)
    net: nn.Module | None
    if options.start == "default":
        net = None
    elif options.by_type:
        names = len(data.condition_names)
        net = ConditionalMap(data.dim, options.hidden, num_conditions=names, start=options.start)
    elif options.start == "none":
        net = MLP(data.dim, options.hidden)
    else:
        net = ResidualMLP(data.dim, options.hidden, start=options.start)
    model = MongeMap() if net is None else MongeMap(
        map=net, cost=options.cost, gap_weight=options.gap_weight, fitting_loss=options.fitting_loss,
        relative_fitting_epsilon=options.fitting_epsilon, optimizer=partial(Adam, lr=options.lr),
        lr_scheduler=partial(CosineAnnealingLR, T_max=options.steps),
    )  # fmt: skip
    Trainer(
        max_steps=options.steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, data)  # fmt: skip
    place = {name: k for k, name in enumerate(data.condition_names)}

    @torch.no_grad()
    def transport(z: Tensor, types: np.ndarray) -> Tensor:
        condition = torch.tensor([place[name] for name in types]) if options.by_type else None
        return model(z.float(), condition).double()

    return transport


def affine(source: Tensor, target: Tensor, *, shrinkage: float | str = 0.0) -> Callable[[Tensor], Tensor]:
    """Return the Gaussian map."""
    A, b = gaussian_map(source, target, shrinkage=shrinkage)
    return lambda z: z @ A + b


class Scorer:
    """Scores of maps on the held-out cells of a task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.representation: AffineRepresentation = task.data().representation.double()
        self.train = [self.encoded(cells) for cells in (task.control, task.treated)]
        self.source, self.target = self.encoded(task.test_control), self.encoded(task.test_treated)
        self.epsilon = 0.05 * resolve("sqeuclidean").mean(self.target, self.target)

    def encoded(self, cells: Cells) -> Tensor:
        """Return the coordinates of cells, in double."""
        return self.representation.encode(torch.from_numpy(cells.x).double())

    def simple_maps(self) -> dict[str, Map]:
        """Return what needs no training."""
        source, target = self.train
        shift, gaussian = target.mean(0) - source.mean(0), affine(source, target)
        found: dict[str, Map] = {
            "identity": lambda z, types: z,
            "mean shift": lambda z, types: z + shift,
            "Gaussian map": lambda z, types: gaussian(z),
        }
        if self.task.typed:
            each = {
                str(name): affine(
                    source[self.task.control.types == name], target[self.task.treated.types == name], shrinkage="auto"
                )
                for name in np.unique(self.task.control.types)
            }
            found["Gaussian map by cell type"] = lambda z, types: torch.stack(
                [each[str(name)](row[None])[0] for row, name in zip(z, types, strict=True)]
            )
        return found

    def of(self, mapped: Map) -> dict[str, float]:
        """Return the scores of a map."""
        images = mapped(self.source, self.task.test_control.types)
        scores = self.fits(images, self.task.test_control.types)
        for name, cost in (("gap l2²", "sqeuclidean"), ("gap l2", "euclidean")):
            pairs = self.source[:1000], images[:1000]
            paid = float(resolve(cost).paired(*pairs).mean())
            gap = float(monge_gap(*pairs, cost=cost, solver="exact"))
            scores[name] = 100 * gap / paid if paid else 0.0
        return scores

    def floor(self, seed: int) -> dict[str, float]:
        """Return the scores of training treated cells: of each type as many as there are control cells to map."""
        draws, types = np.random.default_rng(seed), self.task.treated.types
        rows = []
        for name, count in zip(*np.unique(self.task.test_control.types, return_counts=True), strict=True):
            here = np.flatnonzero(types == name)
            rows.append(draws.choice(here, count, replace=count > len(here)))
        # Of all cells as they come, for the scores of all; by type, for those within types.
        anyhow = draws.choice(len(types), min(len(self.source), len(types)), replace=False)
        by_type = np.concatenate(rows)
        scores = self.fits(self.train[1][anyhow], types[anyhow])
        return scores | {"W1 by type": self.fits(self.train[1][by_type], types[by_type])["W1 by type"]}

    def fits(self, images: Tensor, types: np.ndarray) -> dict[str, float]:
        """Return how near the images are to the held-out treated cells."""
        decoded, target = self.representation.decode(images), self.representation.decode(self.target)
        target_types = self.task.test_treated.types
        w1 = [
            float(marginal_wasserstein(decoded[types == name], target[target_types == name]).mean())
            for name in np.unique(target_types)
            if (types == name).any()
        ]
        return {
            "energy": unbiased_energy_distance(images, self.target),
            "W1 by type": float(np.mean(w1)),
            "W1": float(marginal_wasserstein(decoded, target).mean()),
            "Sinkhorn": float(sinkhorn_divergence(images, self.target, epsilon=self.epsilon)),
        }


SCORES = ("energy", "W1 by type", "W1", "Sinkhorn", "gap l2²", "gap l2")
DIGITS = {"gap l2²": 1, "gap l2": 1}
HEADINGS = {
    "energy": "energy distance",
    "W1 by type": "W1 by cell type",
    "W1": "W1 of all cells",
    "Sinkhorn": "Sinkhorn divergence",
    "gap l2²": "gap of l2², %",
    "gap l2": "gap of l2, %",
}


def trained_maps(task: Task, options: Options) -> dict[str, Options]:
    """Return what is trained, by its name in the table."""
    rows = {
        "default": replace(options, start="default", steps=500),
        "plain MLP, no gap": replace(options, start="none", gap_weight=0.0),
        "MongeMap of a plain MLP": replace(options, start="none"),
        "residual MLP, no gap": replace(options, start="identity", gap_weight=0.0),
        "residual MLP from the Gaussian map, no gap": replace(options, start="gaussian", gap_weight=0.0),
        "MongeMap from the identity": replace(options, start="identity"),
        "MongeMap from the Gaussian map": replace(options, start="gaussian"),
        "MongeMap of cost l2 from the mean shift": replace(options, start="mean", cost="euclidean"),
    }
    if task.typed:
        rows["default by cell type"] = replace(options, start="default", steps=500, by_type=True)
        rows["MongeMap by cell type from the Gaussian map"] = replace(options, by_type=True)
    return rows


def print_table(rows: dict[str, list[dict[str, float]]], columns: tuple[str, ...]) -> None:
    """Print mean ± standard deviation over the runs as Markdown."""
    print("| map | " + " | ".join(HEADINGS.get(name, name) for name in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, runs in rows.items():
        cells = []
        for column in columns:
            values = np.array([run.get(column, np.nan) for run in runs])
            digits = DIGITS.get(column, 0 if column == "s a fit" else 4)
            spread = f"{values.std(ddof=1):.{digits}f}" if len(values) > 1 and column != "s a fit" else "0"
            spread = f" ± {spread}" if float(spread) else ""
            cells.append("" if np.isnan(values).any() else f"{values.mean():.{digits}f}{spread}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def candidates(task: Task) -> dict[str, Options]:
    """Return what is tried in validation."""
    losses = {"Sinkhorn at 5 %": ("sinkhorn", 0.05), "Sinkhorn at 50 %": ("sinkhorn", 0.5), "energy": ("energy", 0.05)}
    found = {
        f"{title}, from the {start}, gap weight {weight:g}": Options(
            start=start, gap_weight=weight, fitting_loss=loss, fitting_epsilon=epsilon, steps=300
        )
        for title, (loss, epsilon) in losses.items()
        for start in ("identity", "gaussian")
        for weight in (0.0, 0.1 if loss == "energy" else 1.0)
    }
    for start in ("identity", "gaussian"):
        found[f"energy, from the {start}, gap weight 0.1, 1000 steps"] = Options(start=start)
    if task.typed:
        found["energy, by cell type, from the gaussian, gap weight 0.1"] = Options(by_type=True, steps=300)
    return found


def scores(name: str, folder: Path, seed: int, choose: bool, only: str) -> dict[str, dict[str, float]]:
    """Return the scores of maps for a seed, on test cells or on validation cells."""
    quiet()
    task = TASKS[name](folder)[choose](seed)
    scorer = Scorer(task)
    rows = {title: scorer.of(mapped) for title, mapped in scorer.simple_maps().items()}
    for title, options in (candidates(task) if choose else trained_maps(task, CHOSEN[name])).items():
        if not re.search(only, title):
            continue
        start = time.process_time()
        mapped = fit(task, options, seed)
        spent = time.process_time() - start
        rows[title] = scorer.of(mapped) | {"s a fit": spent}
        print(f"{name} {seed}: {title}, {spent:.0f} s", file=sys.stderr, flush=True)
    rows["floor: training treated cells"] = scorer.floor(seed)
    return rows


def quiet() -> None:
    """Silence Lightning, and take one thread."""
    torch.set_num_threads(1)
    for logger in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--data", type=Path, default=os.environ.get("LIGHTNING_GAP_DATA"), help="folder of the files")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", default="", help="regular expression: train only maps whose names match")
    parser.add_argument("--choose", action="store_true", help="validate candidates instead of testing")
    args = parser.parse_args()
    if args.data is None:
        parser.error("give --data, the folder of the data files, or set LIGHTNING_GAP_DATA")
    if unknown := set(args.tasks) - set(TASKS):
        parser.error(f"no such task: {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    work = [(name, Path(args.data), seed, args.choose, args.only) for name in args.tasks for seed in args.seeds]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        found = pool.starmap(scores, work, chunksize=1)
    for name in args.tasks:
        runs = [rows for (task, *_), rows in zip(work, found, strict=True) if task == name]
        print(f"\n{name}, {'validation' if args.choose else CHOSEN[name]}\n")
        print_table({title: [run[title] for run in runs] for title in runs[0]}, (*SCORES, "s a fit"))


if __name__ == "__main__":
    main()
