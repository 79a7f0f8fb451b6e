"""Conditions that no map was trained on, one left out at a time, against the simple predictions that may be enough.

    LIGHTNING_GAP_DATA=FOLDER python -m benchmarks.science.unseen_conditions [sachs kang] [--seeds 0 1 2] [--log FILE]

``sachs``: T cells under eight stimulations and inhibitors (Sachs et al. 2005, "Causal protein-signaling networks
derived from multiparameter single-cell data"), logarithms of 11 proteins, divided by their standard deviations. The
source is stimulation by anti-CD3 and anti-CD28 alone. Hand-made embeddings say what a reagent is known to act on, and
how. Needs ``sachs_flow.npz``: ``X_raw`` (n, 11), ``condition``, ``condition_names``.

``kang``: interferon β on eight types of blood cells (Kang et al. 2018, "Multiplexed droplet single-cell RNA-sequencing
using natural genetic variation"), 20 principal components of 100 genes; a type is left out. Its embedding is the mean
of its control cells in 8 principal components of all control cells. Needs ``kang_ifnb.npz``: ``logcounts`` (n, 100),
``treated``, ``cell_type``, ``cell_type_names``.

A held-out condition's treated cells have no part in training, in the coordinates, or in any choice. Scores are those of
``PerturbationScores`` and the energy distance (U-statistic), of held-out control cells mapped, against one half of the
condition's treated cells; the floor is the other half. Each is the mean over the conditions; then mean ± standard
deviation of the seeds, which choose the control cells, halves and initial weights.

Predictions without training are the identity; the mean shift of the condition "on average", the mean of the trained
conditions' shifts; the mean shift and the Gaussian map of the nearest trained condition by the embedding; and, as what
one could know at best of the means, the shift of the condition itself. Networks are one ``ConditionalMap`` for all
trained conditions (two layers of 64, from the Gaussian map of all together, energy distance, 150 steps of Adam at 2e-3
with cosine decay, 64 cells a condition or as many as the smallest has): options that were not tuned on any of this.
``trained`` is their energy distance on the training cells of the conditions that they know. One thread.
"""

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.logs import RESULTS, append, read
from benchmarks.science.map_real_data import quiet, unbiased_energy_distance
from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import ConditionalMap, PerturbationScores, UnpairedBatch, gaussian_map

STEPS = 150
SCORES = ("trained", "energy", "r2", "drug_signature", "mmd", "wasserstein", "sinkhorn_divergence")
# Costimulation, AKT and PI3K, PKC, PIP2, MEK, PKA, and whether CD3 and CD28 are stimulated.
REAGENTS = {
    "cd3cd28_icam2": [1, 0, 0, 0, 0, 0, 1],
    "cd3cd28_aktinhib": [0, -1, 0, 0, 0, 0, 1],
    "cd3cd28_ly": [0, -1, 0, 0, 0, 0, 1],
    "cd3cd28_g0076": [0, 0, -1, 0, 0, 0, 1],
    "cd3cd28_psitect": [0, 0, 0, -1, 0, 0, 1],
    "cd3cd28_u0126": [0, 0, 0, 0, -1, 0, 1],
    "pma": [0, 0, 1, 0, 0, 0, 0],
    "b2camp": [0, 0, 0, 0, 0, 1, 0],
}
Options = dict[str, Any]


def sachs(folder: Path, seed: int) -> tuple[Options, dict[str, list[float]]]:
    """Return arguments of the data module, and the embeddings."""
    z = np.load(folder / "sachs_flow.npz")
    names, x = z["condition_names"][z["condition"]], np.log(z["X_raw"])
    treated = np.isin(names, list(REAGENTS))
    options = {"source": x[names == "cd3cd28"], "target": x[treated], "labels": (None, names[treated])}
    return {**options, "standardize": True}, {name: list(map(float, v)) for name, v in REAGENTS.items()}


def kang(folder: Path, seed: int) -> tuple[Options, dict[str, list[float]]]:
    """Return arguments of the data module, and the embeddings."""
    z = np.load(folder / "kang_ifnb.npz")
    x, types, treated = z["logcounts"].astype(np.float32), z["cell_type_names"][z["cell_type"]], z["treated"] == 1
    control = x[~treated] - x[~treated].mean(0)
    scores = control @ np.linalg.svd(control, full_matrices=False)[2][:8].T
    means = {str(name): scores[types[~treated] == name].mean(0) for name in np.unique(types)}
    spread = float(np.stack(list(means.values())).std())
    options = {"source": x[~treated], "target": x[treated], "labels": (types[~treated], types[treated])}
    return {**options, "components": 20}, {name: (mean / spread).tolist() for name, mean in means.items()}


TASKS: dict[str, Callable[[Path, int], tuple[Options, dict[str, list[float]]]]] = {"sachs": sachs, "kang": kang}


def samples(options: Options, seed: int, embeddings: Mapping[str, list[float]] | None) -> SamplesDataModule:
    """Return the data module, with embeddings or one-hot."""
    given = dict(options)
    source, target, labels = (given.pop(name) for name in ("source", "target", "labels"))
    if embeddings is None:
        labels = tuple(None if side is None else {"condition": side} for side in labels)
    return SamplesDataModule(
        source, target, conditions=labels, condition_embeddings=embeddings, batch_size=64, val_fraction=0.0,
        test_fraction=0.3, test_conditions=[next(iter(np.unique(options["labels"][1])))], small_conditions="shrink",
        seed=seed, eval_batch_size=1024, **given,
    )  # fmt: skip


def scores(images: Tensor, batch: UnpairedBatch) -> dict[str, float]:
    """Return the scores of images of a batch's source."""
    metric = PerturbationScores(max_samples=1024)
    metric.update(batch.source, images[None], batch.target, target_again=batch.target_again)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert batch.target_again is not None
    floor = unbiased_energy_distance(batch.target_again[0].double(), batch.target[0].double())
    return found | {
        "energy": unbiased_energy_distance(images.double(), batch.target[0].double()), "energy_floor": floor
    }  # fmt: skip


def simple(
    fold: SamplesDataModule, name: str, batch: UnpairedBatch, embeddings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the images of predictions that take no training, and of the shift that nobody knows."""
    x = batch.source[0]
    trained = [other for other in fold.condition_names if other != name]
    pairs = {
        other: (source.samples, target.samples)
        for other, (source, target) in zip(trained, fold.training_pairs(), strict=True)
    }
    shifts = {other: target.mean(0) - source.mean(0) for other, (source, target) in pairs.items()}
    at = np.array(embeddings[name])
    nearest = min(trained, key=lambda other: float(np.linalg.norm(np.array(embeddings[other]) - at)))
    A, b = gaussian_map(*pairs[nearest], shrinkage="auto")
    assert batch.target_again is not None
    return {
        "identity": x,
        "mean shift, on average": x + torch.stack(list(shifts.values())).mean(0),
        "mean shift of the nearest": x + shifts[nearest],
        "Gaussian map of the nearest": (x.double() @ A + b).to(x),
        "mean shift of its own (not known)": x + batch.target_again[0].mean(0) - x.mean(0),
    }


def trained(fold: SamplesDataModule, batch: UnpairedBatch, seed: int) -> tuple[Tensor, float]:
    """Return the images under a map that is trained by a trainer on the other conditions, and its distance on these."""
    seed_everything(seed, verbose=False)
    vectors = fold.condition_vectors
    assert vectors is not None
    model = MongeMap(
        map=ConditionalMap(fold.dim, (64, 64), condition_dim=vectors.shape[1], start="gaussian"),
        fitting_loss="energy",
        gap_weight=0.0,
        optimizer=partial(Adam, lr=2e-3),
        lr_scheduler=partial(CosineAnnealingLR, T_max=STEPS),
    )
    Trainer(
        max_steps=STEPS, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, fold)  # fmt: skip
    assert batch.condition is not None
    assert fold.trained_vectors is not None
    with torch.no_grad():
        images: Tensor = model(batch.source[0], batch.condition.expand(len(batch.source[0]), -1))
        fits = []
        for vector, (source, target) in zip(fold.trained_vectors, fold.training_pairs(), strict=True):
            x, y = source.samples[:500], target.samples[:500]
            fits.append(unbiased_energy_distance(model(x, vector.expand(len(x), -1)).double(), y.double()))
    return images, float(np.mean(fits))


def run(task: str, folder: Path, seed: int, log: Path) -> None:
    """Score all predictions of each condition in turn, and append them to the log."""
    options, embeddings = TASKS[task](folder, seed)
    kinds = {"ConditionalMap, embedding": embeddings, "ConditionalMap, one-hot": None}
    folds = [samples(options, seed, vectors).leave_one_condition_out() for vectors in kinds.values()]
    for (name, by_embedding), (_, one_hot) in zip(*folds, strict=True):
        found: dict[str, dict[str, float]] = {}
        start = time.process_time()
        for title, fold in zip(kinds, (by_embedding, one_hot), strict=True):
            (batch,) = fold.test_dataloader()
            if title == "ConditionalMap, embedding":
                images = simple(fold, name, batch, embeddings)
                found |= {of: scores(x, batch) for of, x in images.items()}
            mapped, fit = trained(fold, batch, seed)
            found[title] = scores(mapped, batch) | {"trained": fit}
        print(f"{task} {seed}: {name}, {time.process_time() - start:.0f} s", flush=True)
        sizes = {"source": batch.source.shape[1], "target": batch.target.shape[1]}
        for title, values in found.items():
            append(log, {"task": task, "seed": seed, "condition": name, "map": title, **sizes, "scores": values})


def tables(log: Path) -> None:
    """Print means over conditions as Markdown, and the energy distance of each condition."""
    rows = read(log)
    for task in dict.fromkeys(row["task"] for row in rows):
        here = [row for row in rows if row["task"] == task]
        titles = list(dict.fromkeys(row["map"] for row in here))
        conditions, seeds = ({row[of] for row in here} for of in ("condition", "seed"))
        print(f"\n{task}, {len(conditions)} conditions, {len(seeds)} seeds\n")
        print(f"| map | {' | '.join(SCORES)} |\n{'|---' * (len(SCORES) + 1)}|")
        for title in [*titles, "floor"]:
            print(f"| {title} | " + " | ".join(_cell(here, title, score) for score in SCORES) + " |")
        names = list(dict.fromkeys(row["condition"] for row in here))
        print(f"\n| energy distance | {' | '.join(titles)} |\n{'|---' * (len(titles) + 1)}|")
        for name in names:
            of_name = [row for row in here if row["condition"] == name]
            cells = [_spread([r["scores"]["energy"] for r in of_name if r["map"] == title]) for title in titles]
            print(f"| {name} | {' | '.join(cells)} |")


def _cell(rows: list[dict[str, Any]], title: str, score: str) -> str:
    by_seed: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["map"] == ("identity" if title == "floor" else title):
            value = row["scores"].get(f"{score}_floor" if title == "floor" else score)
            by_seed[row["seed"]] += [] if value is None else [value]
    return _spread([float(np.mean(values)) for values in by_seed.values() if values])


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{np.mean(values):.3g}" + (f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else "")


def main() -> None:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}; none prints the log")
    parser.add_argument("--data", type=Path, default=os.environ.get("LIGHTNING_GAP_DATA"), help="folder of the files")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--log", type=Path, default=RESULTS / "unseen_conditions.jsonl", help="JSON lines, appended")
    parser.add_argument("--tables", action="store_true", help="print the tables of the log, and run nothing")
    args = parser.parse_args()
    if not args.tables:
        if args.data is None:
            parser.error("give --data, the folder of the data files, or set LIGHTNING_GAP_DATA")
        if unknown := set(args.tasks) - set(TASKS):
            parser.error(f"no such task: {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
        quiet()
        for task in args.tasks:
            for seed in args.seeds:
                run(task, Path(args.data), seed, args.log)
    tables(args.log)


if __name__ == "__main__":
    main()
