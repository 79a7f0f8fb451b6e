"""What each number of the objective does, on pairs whose optimal map is known.

    python -m benchmarks.science.monge_gap.ablations --data FOLDER [--dims 2 8] [--only gap batch ...]

A free network (``ResidualMLP``, which is optimal for nothing by itself) is trained on the Wasserstein-2 benchmark's
pairs Mix3toMix10 (Korotin et al. 2021; ``w2_mix3to10_D{D}.npz`` in ``--data``, see ``transport_maps.py``), and compared
with the true map on the benchmark's 4096 test samples. One number is changed at a time. These are reports:
no setting was chosen by them. Rows are appended as they come, and those in the log are not repeated.
"""

import argparse
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
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
from benchmarks.measurements import six_digits
from benchmarks.science.monge_gap.settings import BASE, SEEDS
from lightning_gap import MongeMap, SamplesDataModule, monge_gap, sinkhorn_divergence
from lightning_gap.monge import ResidualMLP
from lightning_gap.monge.objective import MapObjective, ObjectiveTerms
from lightning_gap.trainer.terminal import quiet

HIDDEN, LR, UPDATES = (64, 64, 64), 2e-3, 400
# What is changed, and to what; the base is a row of each.
ABLATIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "weight": ("gap_weight", (0.0, 0.01, 0.1, 1.0, 10.0)),
    "gap_epsilon": ("relative_gap_epsilon", (0.001, 0.01, 0.1, 0.5)),
    "fitting_epsilon": ("relative_fitting_epsilon", (0.005, 0.05, 0.2, 1.0)),
    "convention": ("convention", ("shannon", "kl", "debiased", "exact")),
    "batch": ("batch", (128, 256, 512, 1024, 2048)),
}
# The comparison with and without a gap is repeated more often.
HEADLINE, HEADLINE_SEEDS = (0.0, 1.0), (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class OtherGap(MapObjective):
    """The objective with a gap of another convention, or without regularization.

    Attributes:
        convention: ``"kl"``, ``"debiased"`` or ``"exact"``.
    """

    convention: str = "kl"

    def terms(
        self, source: Tensor, mapped: Tensor, target: Tensor, *, fitting_epsilon: float | None,
        gap_epsilon: float | None, with_gap: bool = True, **_: Any,
    ) -> ObjectiveTerms:  # fmt: skip
        """Return the divergence, and the gap where it is asked for; the functions warn where they did not converge."""
        divergence = sinkhorn_divergence(mapped, target, cost=self.fitting_cost, epsilon=fitting_epsilon)
        if not with_gap:
            return ObjectiveTerms(divergence, None, 0.0, True)
        how: dict[str, Any] = (
            {"solver": "exact"}
            if self.convention == "exact"
            else {"convention": self.convention, "epsilon": gap_epsilon}
        )
        return ObjectiveTerms(divergence, monge_gap(source, mapped, cost=self.cost, **how), 0.0, True)


def fit(source: Tensor, target: Tensor, settings: dict[str, Any], seed: int, updates: int) -> tuple[MongeMap, float]:
    """Return a trained map, and the CPU seconds of ``Trainer.fit``."""
    seed_everything(seed, verbose=False)
    options = {name: value for name, value in settings.items() if name not in ("batch", "convention")}
    model = MongeMap(
        map=ResidualMLP(source.shape[1], HIDDEN),
        optimizer=partial(Adam, lr=LR),
        lr_scheduler=partial(CosineAnnealingLR, T_max=updates),
        **options,
    )
    if settings["convention"] != "shannon":
        given = {field.name: getattr(model.objective, field.name) for field in fields(model.objective)}
        model.objective = OtherGap(**given, convention=settings["convention"])
    data = SamplesDataModule(source, target, batch_size=settings["batch"], val_fraction=0, seed=seed)
    trainer = Trainer(
        max_steps=updates, accelerator="cpu", devices=1, limit_val_batches=0, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    started = time.process_time()
    trainer.fit(model, data)
    return model, time.process_time() - started


def row(pairs: dict[str, Tensor], settings: dict[str, Any], seed: int, updates: int) -> dict[str, float]:
    """Train a map; return L2-UVP, the exact gap and the divergence, each in % of Var(ν), and the CPU seconds."""
    model, seconds = fit(pairs["train_x"], pairs["train_y"], settings, seed, updates)
    x, true, variance = pairs["test_x"].double(), pairs["test_map"].double(), float(pairs["var_out"])
    mapped = model.transport(pairs["test_x"]).double()
    gap = monge_gap(x[:1024], mapped[:1024], solver="exact")
    # Of other samples than those whose images they are; 5 % of the target's mean cost, whatever was trained with.
    fitted = sinkhorn_divergence(mapped[:1024], true[1024:2048], epsilon=0.1 * variance, tolerance=1e-4)
    return {
        "uvp": 100 * float((mapped - true).square().sum(1).mean()) / variance,
        "gap": 100 * float(gap) / variance,
        "divergence": 100 * float(fitted) / variance,
        "seconds": seconds,
    }


def wanted(only: Sequence[str], dims: Sequence[int]) -> list[tuple[int, dict[str, Any], int]]:
    """Return dimensions, settings and seeds: the comparison with and without a gap first."""
    headline = HEADLINE if "weight" in only else ()
    rows = [(dim, BASE | {"gap_weight": weight}, s) for s in HEADLINE_SEEDS for dim in dims for weight in headline]
    for name, seed, dim in product(only, SEEDS, dims):
        rows += [(dim, BASE | {ABLATIONS[name][0]: value}, seed) for value in ABLATIONS[name][1]]
    unique = [one for place, one in enumerate(rows) if one not in rows[:place]]
    return sorted(unique, key=lambda one: one[1]["batch"] > 1024)  # what takes longest at the end


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is asked for and not in the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIGHTNING_GAP_DATA", "data")))
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--only", nargs="+", choices=ABLATIONS, default=list(ABLATIONS))
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--logs", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    log = args.logs / "monge_gap_ablations.jsonl"
    pairs = {dim: read_pairs(args.data / f"w2_mix3to10_D{dim}.npz") for dim in args.dims}
    for dim, settings, seed in wanted(args.only, args.dims):
        key = {"D": dim, "updates": args.updates, **settings, "seed": seed}
        if not any(key.items() <= known.items() for known in read(log)):
            with quiet():
                append(log, six_digits(key | row(pairs[dim], settings, seed, args.updates)))


def read_pairs(path: Path) -> dict[str, Tensor]:
    """Return the arrays of one of the benchmark's files."""
    with np.load(path) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


if __name__ == "__main__":
    main()
