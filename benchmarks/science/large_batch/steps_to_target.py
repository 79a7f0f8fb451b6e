"""Updates to a target at a batch that was left out, predicted by the trade-off that is fitted to the other batches.

A network of 32 units on scikit-learn's digits, plain SGD at a constant learning rate, batches from 8 to 512. The rate
of each batch is the best of a grid for the target, or follows a rule from the best of the batch 32. And the runs of
AdamW on Fashion-MNIST in ``results/large_batch_f1_fashion.jsonl``, of three batches. Minutes on one core.

python -m benchmarks.science.large_batch.steps_to_target            # train, write the log and the page's tables
python -m benchmarks.science.large_batch.steps_to_target --logged   # write the page's tables from the log
python -m benchmarks.science.large_batch.steps_to_target --check    # only say which tables the log contradicts
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.logs import RESULTS, append, read
from benchmarks.marked import DOCS, differences, table, write
from lightning_gap.dashboards.targets import HOLD, Target, first_held
from lightning_gap.regime import fit_critical_batch, lr_factor

LOG, PAGE = "steps_to_target.jsonl", DOCS / "critical_batch.md"
BATCHES, SEEDS, REFERENCE = (8, 16, 32, 64, 128, 256, 512), tuple(range(6)), 32
RATES = tuple(2.0 ** (power / 2) for power in range(-8, 7))
TARGETS = tuple(Target("train_loss", "<=", value) for value in (0.5, 0.2, 0.05))
RULES = ("sqrt", "linear", "none")
HIDDEN, MOST_UPDATES, POINTS = 32, 2000, 1.04
CHANCE, LOST_AFTER = 2.2, 200  # a network that is no better than that after so many updates is lost
# Of the logged runs: what they are, and the columns of each batch. Their rate falls first after ten epochs.
LOGGED = {
    "AdamW, rate as it was": {128: "adamw_sb", 512: "adamw_lb512", 4096: "adamw_lb"},
    "AdamW, rate by a rule": {128: "adamw_sb", 512: "adamw_rule512", 4096: "adamw_lr"},
}
LOGGED_TARGETS = tuple(Target("test_loss", "<=", value) for value in (0.6, 0.5, 0.4))
ASKED = 0.15

Updates = Mapping[int, Sequence[float | None]]  # of each batch, seed by seed


class Digits:
    """Networks of all rates and seeds at once, on all digits."""

    def __init__(self, seeds: Sequence[int]) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images / 16, dtype=torch.float32)
        self.images -= self.images.mean(0)
        self.labels, self.seeds = torch.tensor(labels), seeds

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield ``(seeds, size)`` indices, epoch after epoch."""
        draws = [torch.Generator().manual_seed(1000 + seed) for seed in self.seeds]
        while True:
            order = torch.stack([torch.randperm(len(self.images), generator=draw) for draw in draws])
            yield from order[:, : order.shape[1] // size * size].split(size, 1)

    def start(self, rates: int) -> list[Tensor]:
        """Return the first weights, ``(seeds x rates, ...)``."""
        weights = []
        for fan_in, fan_out in ((self.images.shape[1], HIDDEN), (HIDDEN, 10)):
            draws = [torch.Generator().manual_seed(seed) for seed in self.seeds]
            first = [torch.randn(fan_in, fan_out, generator=draw) * math.sqrt(2 / fan_in) for draw in draws]
            weights += [torch.stack(first).repeat_interleave(rates, 0), torch.zeros(rates * len(first), 1, fan_out)]
        return [weight.requires_grad_() for weight in weights]

    def losses(self, weights: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Return the loss of each network on its seed's rows, ``(seeds, n)``."""
        rates = len(weights[0]) // len(self.seeds)
        images, labels = (each[rows].repeat_interleave(rates, 0) for each in (self.images, self.labels))
        units = torch.relu(torch.baddbmm(weights[1], images, weights[0]))
        logits = torch.baddbmm(weights[3], units, weights[2])
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return each.view(len(weights[0]), -1).mean(1)

    def curves(self, size: int, rates: Sequence[float], wanted: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Return updates, and ``(updates, seeds, rates)`` training losses, until those wanted are held, or lost.

        One wanted loss for all rates: until a quarter beyond where all seeds are there by one rate. One for each rate:
        until all are.
        """
        weights = self.start(len(rates))
        steps = torch.tensor(rates).repeat(len(self.seeds))[:, None, None]
        everything = torch.arange(len(self.images)).expand(len(self.seeds), -1)
        at, losses, last = list[int](), list[np.ndarray](), float(MOST_UPDATES)
        for update, rows in enumerate(self.batches(size), 1):
            gradients = torch.autograd.grad(self.losses(weights, rows).sum(), weights)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight -= steps * gradient
                if at and update < POINTS * at[-1] and update < last:
                    continue
                at.append(update)
                losses.append(self.losses(weights, everything).view(len(self.seeds), -1).numpy())
            there = (np.stack(losses[-HOLD:]).max(0) <= np.array(wanted)) & (len(at) >= HOLD)
            lost = ~(losses[-1] < CHANCE) & (update >= LOST_AFTER)  # units that are dead, or no numbers
            done = there.all(0).any() if len(wanted) == 1 else (there | lost).all()
            last = min(last, update * (1.25 if len(wanted) == 1 else 1)) if done else last
            if update >= last:
                return np.array(at), np.stack(losses)
        raise AssertionError("batches are without end")


def train(log: Path) -> None:
    """Train, and write a row for each batch, rule and target."""
    digits = Digits(SEEDS)
    log.unlink(missing_ok=True)
    found = {}
    for batch in BATCHES:
        at, losses = digits.curves(batch, RATES, [min(target.value for target in TARGETS)])
        for target in TARGETS:
            held = [[first_held(at, losses[:, k, r], target) for k in range(len(SEEDS))] for r in range(len(RATES))]
            best = min(range(len(RATES)), key=lambda r: math.prod(each or math.inf for each in held[r]))
            found[batch, target] = RATES[best]
            _put(log, batch, "best of a grid", RATES[best], target, held[best])
    for rule in RULES:
        for batch in BATCHES:
            rates = [found[REFERENCE, target] * lr_factor(rule, batch / REFERENCE) for target in TARGETS]
            at, losses = digits.curves(batch, rates, [target.value for target in TARGETS])
            for i, target in enumerate(TARGETS):
                held = [first_held(at, losses[:, k, i], target) for k in range(len(SEEDS))]
                _put(log, batch, rule, rates[i], target, held)


def _put(log: Path, batch: int, rule: str, rate: float, target: Target, held: Sequence[float | None]) -> None:
    updates = [None if each is None else round(each, 2) for each in held]
    append(log, {"batch": batch, "rule": rule, "rate": rate, "target": str(target), "updates": updates})


def of_digits(log: Path) -> dict[tuple[str, str], Updates]:
    """Return the updates of each rule and target."""
    found: dict[tuple[str, str], dict[int, list[float | None]]] = defaultdict(dict)
    for row in read(log):
        found[row["rule"], row["target"]][row["batch"]] = row["updates"]
    return dict(found)


def of_fashion(log: Path) -> dict[tuple[str, str], Updates]:
    """Return the same of the logged runs: held at two tests, each after an epoch."""
    rows, found = read(log), {}
    for name, columns in LOGGED.items():
        for target in LOGGED_TARGETS:
            found[name, str(target)] = {
                batch: [_held(row["log"], target) for row in rows if row["column"] == column]
                for batch, column in columns.items()
            }
    return found


def _held(log: Mapping[str, Sequence[Any]], target: Target) -> float | None:
    tests = [(step + 1, x) for step, x in zip(log["step"], log[target.metric], strict=True) if x is not None]
    return first_held(*zip(*tests, strict=True), target, hold=2)


def blocks(logs: Path) -> dict[str, str]:
    """Return the page's tables."""
    digits, fashion = of_digits(logs / LOG), of_fashion(logs / "large_batch_f1_fashion.jsonl")
    return {"digits": _errors(digits, BATCHES), "fashion": _errors(fashion, (128, 512, 4096))}


def _errors(runs: Mapping[tuple[str, str], Updates], batches: Sequence[int]) -> str:
    rows = []
    for (name, target), updates in runs.items():
        held = [(batch, each) for batch, seeds in updates.items() for each in seeds if each is not None]
        missing = sum(map(len, updates.values())) - len(held)
        try:
            fit = fit_critical_batch(*zip(*held, strict=True))
        except (ValueError, TypeError):
            rows.append([name, target.replace("<=", " ≤ "), "–", "–", *("–" for _ in batches), missing])
            continue
        low, high = fit.intervals.get("critical_batch", (0.0, math.inf))
        between = "0 to ∞" if math.isinf(high) else f"{low:.3g} to {high:.3g}"
        critical = "∞" if math.isinf(fit.critical_batch) else f"{fit.critical_batch:.3g}"
        errors = [fit.left_out.get(batch) for batch in batches]
        cells = ["–" if e is None else f"{e:+.0%}" if abs(e) <= ASKED else f"**{e:+.0%}**" for e in errors]
        rows.append([name, target.replace("<=", " ≤ "), critical, between, *cells, missing])
    titles = ["rate", "target", "critical batch", "95 %", *(f"error at {batch}" for batch in batches), "never held"]
    return table(titles, rows)


def main() -> None:
    """Train, or read the log; write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=RESULTS)
    parser.add_argument("--logged", action="store_true", help="do not train")
    parser.add_argument("--check", action="store_true", help="only say which tables the log contradicts")
    options = parser.parse_args()
    if not (options.logged or options.check):
        torch.set_num_threads(1)
        train(options.logs / LOG)
    made = blocks(options.logs)
    if options.check:
        wrong = differences(PAGE, made)
        raise SystemExit(f"{PAGE.name} contradicts its logs in: {', '.join(wrong)}" if wrong else 0)
    write(PAGE, made)
    print(*made.values(), sep="\n\n")


if __name__ == "__main__":
    main()
