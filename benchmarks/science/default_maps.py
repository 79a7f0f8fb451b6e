"""The default map on real data that it was not made for: is it ever worse than a map that takes no training?

    python -m benchmarks.science.default_maps --data FOLDER [--only REGEX] [--costs NAME …] [--seeds 0] [--label TEXT]
        [--budgets "500 steps" "20 epochs"] [--out FILE]
    python -m benchmarks.science.default_maps --page    # write docs/results/default_maps.md from the log

On each pair of ``real_pairs.py``, ``MongeMap(cost=…)`` with nothing more is trained by ``Trainer(max_steps=500)`` (or
``max_epochs=20``) on ``SamplesDataModule(source, target)``, which keeps a tenth for validation, as a user's would be.
``gaussian_map``, with shrinkage and without, and the shift between the means are taken from the same training samples.
Where types of cells are known to the map, these simple maps have one fit a type.

All are scored on samples that none has seen, in the coordinates of training and in double: the energy distance of the
images, as a U-statistic, whose expectation is 0 for equal distributions. The standard error is that of the *difference*
between two maps of the same samples. The floor is as many training samples of the target in place of images. Seconds
are CPU time of ``Trainer.fit``, one thread. The exact Monge gap is that of up to 1000 samples, in percent of what is
paid. Rows are kept in ``--out``, each in the place of an earlier one of the same label, pair, cost, budget and seed.
"""

import argparse
import logging
import os
import re
import statistics
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from benchmarks.logs import RESULTS, put, read
from benchmarks.marked import DOCS, table, write
from benchmarks.measurements import six_digits
from benchmarks.science.held_out_energy import difference, unbiased_energy_distance
from benchmarks.science.real_pairs import COSTS, ON_THE_SPHERE, Pair, pairs
from lightning_gap import MongeMap, SamplesDataModule, monge_gap
from lightning_gap.monge import SphereMap, gaussian_map
from lightning_gap.monge.costs import resolve
from lightning_gap.trainer.terminal import quiet

__all__ = ["LOG", "PAGE", "blocks", "costs_of", "measure", "rows_of_table", "simple_images", "summary", "verdict"]

PAGE = DOCS / "results" / "default_maps.md"
LOG = RESULTS / "default_maps.jsonl"
ROUNDING = 1e-5  # of energy distances in single
SIMPLE = ("identity", "mean shift", "Gaussian map", "Gaussian map, shrunk")
CLOSED_FORMS = ("mean shift", "Gaussian map")  # the better of which is never to be behind
BUDGETS = {"500 steps": {"max_steps": 500, "max_epochs": -1}, "20 epochs": {"max_epochs": 20}}
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip
KEY = ("label", "pair", "cost", "budget", "seed")


def costs_of(pair: Pair, asked: Sequence[str]) -> list[str]:
    """Return the costs that a pair is tried with: all where it is one of the small, and the squared one anyway."""
    if pair.sphere:
        return [cost for cost in (*asked, ON_THE_SPHERE) if cost in ("sqeuclidean", "cosine", ON_THE_SPHERE)]
    return [cost for cost in asked if cost == "sqeuclidean" or pair.small]


def default_map(dim: int, cost: str) -> tuple[MongeMap, str]:
    """Return the module that a user gets, and what had to be given beside the cost."""
    if cost != ON_THE_SPHERE:
        return MongeMap(cost=cost), ""
    return MongeMap(cost=cost, fitting_cost=cost, map=SphereMap(dim)), "SphereMap"


def simple_images(source: Tensor, target: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Return the images of samples under what takes no training."""
    images = {"identity": x, "mean shift": x + target.mean(0) - source.mean(0)}
    for name, shrinkage in zip(SIMPLE[2:], (0.0, "auto"), strict=True):
        A, b = gaussian_map(source, target, shrinkage=shrinkage)  # type: ignore[arg-type]
        images[name] = x @ A + b  # A is symmetric
    return images


def _simple_by_type(data: SamplesDataModule, x: Tensor, kinds: Sequence[str] | None) -> dict[str, Tensor]:
    if kinds is None:
        source, target = (samples.double() for samples in data.training_samples())
        return simple_images(source, target, x)
    images = {name: x.clone() for name in SIMPLE}
    for name, (source, target) in zip(data.condition_names, data.training_pairs(), strict=True):
        rows = torch.from_numpy(np.asarray(kinds) == name)
        found = simple_images(source.samples.double(), target.samples.double(), x[rows])
        for kind, part in found.items():
            images[kind][rows] = part
    return images


def _fit(data: SamplesDataModule, cost: str, budget: str, seed: int) -> tuple[MongeMap, float, str]:
    seed_everything(seed, verbose=False)
    model, given = default_map(data.dim, cost)
    trainer = Trainer(**BUDGETS[budget], **QUIET)  # type: ignore[arg-type]
    start = time.process_time()
    trainer.fit(model, data)
    return model, time.process_time() - start, given


def measure(pair: Pair, cost: str, *, budget: str = "500 steps", seed: int = 0, label: str = "") -> dict[str, Any]:
    """Train the default map on a pair, and return the row of its scores on what is held out."""
    data = pair.data(seed=seed)
    x, y = pair.held_out(data)
    kinds = None if pair.types is None else pair.types[1][0]
    images = _simple_by_type(data, x, kinds)
    model, seconds, given = _fit(data, cost, budget, seed)
    condition = None if kinds is None else torch.tensor([data.condition_names.index(name) for name in kinds])
    with torch.no_grad():
        model.eval()
        images["default"] = torch.cat([
            model(part.float(), None if condition is None else condition[rows]).double()
            for rows, part in ((slice(k, k + 1024), x[k : k + 1024]) for k in range(0, len(x), 1024))
        ])  # fmt: skip
    energy = {name: unbiased_energy_distance(z, y) for name, z in images.items()}
    best = min(CLOSED_FORMS, key=energy.__getitem__)
    value, error = difference(images["default"], images[best], y)
    target = data.training_samples()[1].double()
    generator = torch.Generator().manual_seed(seed)
    some = target[torch.randperm(len(target), generator=generator)[: max(2, len(x))]]
    row: dict[str, Any] = {
        "label": label, "pair": pair.name, "cost": cost, "budget": budget, "seed": seed, "given": given,
        "n": [len(side) for side in data.training_samples()], "d": data.dim, "held_out": [len(x), len(y)],
        "map": type(model.map).__name__, **energy, "floor": unbiased_energy_distance(some, y), "best": best,
        "difference": value, "error": error, "spread": float(images["default"].var(0).sum() / y.var(0).sum()),
        "gap": _gap(x, images["default"], cost), "seconds": seconds,
    }  # fmt: skip
    return six_digits(row)


def _gap(x: Tensor, images: Tensor, cost: str) -> float | None:
    """Return the exact gap of up to 1000 samples, in percent of what is paid; ``None`` where it is not defined."""
    x, images = x[:1000], images[:1000]
    paid = float(resolve(cost).paired(x, images).mean())
    return 100 * float(monge_gap(x, images, cost=cost, solver="exact")) / paid if paid > 0 else 0.0


def verdict(row: Mapping[str, Any]) -> str:
    """Return whether the default is behind the better closed form, by more than one or two standard errors."""
    behind, error = row["difference"], row["error"]
    if max(abs(behind), error) < ROUNDING:
        return "same"  # the same map, in single and in double
    if not behind <= 2 * error:  # nor is a number that is none
        return "**worse**"
    return "worse" if behind > error else "better" if behind < -error else "same"


COLUMNS = (
    "pair", "n, m", "d", "cost", "mean shift", "Gaussian map", "default", "floor", "behind the better by", "", "gap, %",
    "CPU s",
)  # fmt: skip


def rows_of_table(rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Return the cells of a table; over several seeds, of the median difference."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["pair"], row["cost"], row["budget"]), []).append(row)
    lines = []
    for (pair, cost, _), found in groups.items():
        row = sorted(found, key=lambda r: r["difference"])[len(found) // 2]
        numbers = [f"{row[name]:.4f}" for name in ("mean shift", "Gaussian map", "default", "floor")]
        behind = f"{row['difference']:+.4f} ± {row['error']:.4f}".replace("-", "−")
        gap = "" if row["gap"] is None else f"{max(0.0, row['gap']):.1f}"
        seconds = f"{statistics.median(r['seconds'] for r in found):.0f}"
        lines.append([
            pair, ", ".join(map(str, row["n"])), str(row["d"]), cost, *(n.replace("-", "−") for n in numbers), behind,
            verdict(row), gap, seconds,
        ])  # fmt: skip
    return lines


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how often the default is behind."""
    found = [verdict(row) for row in rows]
    worse, clearly = found.count("worse"), found.count("**worse**")
    return (
        f"{len(found)} fits: the default is better than the better closed form by more than a standard error in "
        f"{found.count('better')}, within one in {found.count('same')}, behind by more than one in {worse + clearly}, "
        f"and by more than two in {clearly}."
    )


def blocks(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the blocks of the page."""
    made = {}
    for label in ("default", "before"):
        of_label = [row for row in rows if row["label"] == label]
        squared = [row for row in of_label if row["cost"] == "sqeuclidean"]
        made[f"summary, {label}"] = summary(of_label)
        made[f"squared cost, {label}"] = table(COLUMNS, rows_of_table(squared))
        made[f"other costs, {label}"] = table(COLUMNS, rows_of_table(row for row in of_label if row not in squared))
    return made


def _run(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for pair in pairs(args.data, re.compile(args.only).search):
        if args.quick and not pair.small:
            continue
        for cost in costs_of(pair, args.costs):
            for budget in args.budgets:
                for seed in args.seeds:
                    try:
                        row = measure(pair, cost, budget=budget, seed=seed, label=args.label)
                    except Exception as error:  # a fit that fails is a finding, and the others are to run
                        print(f"{pair.name}, {cost}: {type(error).__name__}: {error}", flush=True)
                        continue
                    put(args.out, row, lambda known, row=row: all(known.get(k) == row[k] for k in KEY))  # type: ignore[misc]
                    found.append(row)
                    print(" | ".join(rows_of_table([row])[0]), row["map"], f"spread {row['spread']:.2f}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LIGHTNING_GAP_DATA", "data")))
    parser.add_argument("--only", default="", help="pairs whose name this finds")
    parser.add_argument("--costs", nargs="+", default=list(COSTS))
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=["500 steps"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--label", default="default", help="what is measured, such as a state of the package")
    parser.add_argument("--quick", action="store_true", help="only the pairs that every cost is tried on")
    parser.add_argument("--out", type=Path, default=LOG)
    parser.add_argument("--page", action="store_true", help="only write the page from the log")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    if args.page:
        write(PAGE, blocks(read(args.out)))
        return
    with quiet(logging.ERROR):
        rows = _run(args)
    print(table(COLUMNS, rows_of_table(rows)))
    print(summary(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
