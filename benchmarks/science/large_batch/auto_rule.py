"""What ``lr_rule="auto"`` does beside ``"sqrt"`` and ``"none"``, on scikit-learn's digits, a small network.

    python -m benchmarks.science.large_batch.auto_rule             (all seeds, ten minutes on one core)
    python -m benchmarks.science.large_batch.auto_rule --seeds 0
    python -m benchmarks.science.large_batch.auto_rule --page      (only print the table of the log)

Two layers of 64, 1400 images to train on and 397 to test on, in a loop of one's own that applies the plan. SGD with
momentum 0.9 at 0.05, and AdamW at 0.001 with weight decay 0.1; the reference batch is 8; short is 3 epochs and long 15,
of the reference run. "longer" is ``train_longer``: 0 has the reference run's samples, 0.1 a tenth of the way, 1 its
updates. Rows that lose stand beside those that win.
"""

import argparse
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.logs import RESULTS, append, read
from lightning_gap.regime import plan_regime

LOG = RESULTS / "large_batch_auto_rule.jsonl"
REFERENCE, TRAINED = 8, 1400
OPTIMIZERS: dict[str, tuple[Any, dict[str, float]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
}
RULES: dict[str, dict[str, Any]] = {
    "none": {"lr_rule": "none"},
    "sqrt": {"lr_rule": "sqrt"},
    "sqrt, all": {"lr_rule": "sqrt", "weight_decay_rule": "timescale", "betas_rule": "half_life"},
    "auto": {"lr_rule": "auto"},
}
RATIOS, EPOCHS, LONGER = (8, 32), {"short": 3, "long": 15}, (0.0, 0.1, 1.0)


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return torch.tensor(found.data[order] / 16, dtype=torch.float32), torch.tensor(found.target[order])


def trained(optimizer: str, rule: str, ratio: int, epochs: int, longer: float, seed: int) -> dict[str, Any]:
    """Return the test accuracy in % at the end of a run, and how long it was."""
    x, y = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    kind, options = OPTIMIZERS[optimizer]
    made = kind(model.parameters(), **options)
    batch = ratio * REFERENCE
    plan = plan_regime(
        reference_batch_size=REFERENCE, batch_size=batch, samples=TRAINED, max_epochs=epochs, train_longer=longer,
        **RULES[rule],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what "sqrt" leaves out for AdamW
        clock = plan.apply(made)
    draws = torch.Generator().manual_seed(seed)
    while not clock.over:
        for rows in torch.randperm(TRAINED, generator=draws).split(batch):
            made.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            made.step()
            clock.step()
            if clock.over:
                break
    with torch.no_grad():
        right = (model(x[TRAINED:]).argmax(1) == y[TRAINED:]).double().mean()
    return {"accuracy": round(100 * float(right), 3), "updates": clock.updates, "why": clock.plan.why}


def cells(seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Yield what is to be run; of the ratio 1, which no rule and no length changes, the reference run alone."""
    for seed, optimizer, length in product(seeds, OPTIMIZERS, EPOCHS):
        same = {"seed": seed, "optimizer": optimizer, "length": length}
        yield same | {"ratio": 1, "longer": 1.0, "rule": "none"}
        for ratio, longer, rule in product(RATIOS, LONGER, RULES):
            if optimizer == "AdamW" or rule != "sqrt, all":  # SGD has nothing more to scale
                yield same | {"ratio": ratio, "longer": longer, "rule": rule}


def table(rows: list[dict[str, Any]]) -> str:
    """Return accuracy in %, mean ± standard deviation over seeds, a line for each optimizer, length and ratio."""
    lines = [f"{'':32}{'updates':>8}" + "".join(f"{rule:>16}" for rule in RULES)]
    settings = dict.fromkeys((row["optimizer"], row["length"], row["ratio"], row["longer"]) for row in rows)
    for setting in sorted(settings, key=lambda each: (each[0], each[1] != "short", each[2:])):
        optimizer, length, ratio, longer = setting
        these = [r for r in rows if (r["optimizer"], r["length"], r["ratio"], r["longer"]) == setting]
        told = []
        for rule in RULES:
            found = [row["accuracy"] for row in these if row["rule"] == rule]
            told.append(f"{mean(found):.2f} ± {stdev(found) if len(found) > 1 else 0:.2f}" if found else "")
        name = f"{optimizer}, {length}, κ = {ratio}, longer {longer:g}"
        lines.append(f"{name:32}{these[0]['updates']:>8}" + "".join(f"{each:>16}" for each in told))
    return "\n".join(lines)


def main() -> None:
    """Run what has no log yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--log", type=Path, default=LOG)
    parser.add_argument("--page", action="store_true", help="only print the table")
    options = parser.parse_args()
    known = read(options.log)
    for cell in () if options.page else cells(options.seeds):
        if not any(cell.items() <= row.items() for row in known):
            arguments = (cell["optimizer"], cell["rule"], cell["ratio"], EPOCHS[cell["length"]], cell["longer"])
            append(options.log, cell | trained(*arguments, cell["seed"]))
    print(table(read(options.log)))


if __name__ == "__main__":
    main()
