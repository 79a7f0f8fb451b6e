"""Structured maps against a free one: how optimal a map is when it fits the target equally well.

    python -m benchmarks.science.structured_maps [--costs "pnorm(p=1.5)" "pnorm(p=3)" "elastic(lam=0.5)"]
        [--seeds 0 1 2]

The source is a standard Gaussian of dimension ``--dim``, the target a mixture of four Gaussians around a random point.
Each map has two hidden layers of width 64, starts at the translation between the means, and sees the same fresh batches
of 256 in a plain loop of Adam at 2e-3: Sinkhorn divergence at 5 % of the mean squared distance within the target, plus
the weight times the Monge gap at 1 % of the mean cost. The free map is a ``ResidualMLP``; "field" a ``StructuredMap``
with a free field and its conservativity at weight 0.01; "potential" a ``StructuredMap`` with the gradient of a
potential.

Every 50 steps the divergence and the exact gap (an assignment, in double) are measured on 1000 held-out samples. A
map's gap at equal divergence is that at its first measurement whose divergence is no more than the level, the highest
among the lowest divergences that the three maps reach with that cost, weight and seed. Means and standard deviations
are over seeds; the gap is in percent of the mean cost of moving a sample. One thread.
"""

import argparse
import itertools
import os
import time
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_gap import costs, monge_gap, sinkhorn_divergence
from lightning_gap.monge import ResidualMLP, StructuredMap, conservativity, divergence_and_gap

MAPS = ("free", "field", "potential")
HELD_OUT, EVERY = 1000, 50


class Measurement(NamedTuple):
    """What a map is worth on held-out samples."""

    divergence: float
    gap: float


class Task:
    """Samplers of source and target."""

    def __init__(self, dim: int, seed: int) -> None:
        self.dim = dim
        generator = torch.Generator().manual_seed(1000 + seed)
        self.means = 2 * torch.randn(4, dim, generator=generator) + torch.randn(dim, generator=generator)

    def source(self, n: int, generator: torch.Generator) -> Tensor:
        """Return ``(n, dim)`` samples."""
        return torch.randn(n, self.dim, generator=generator)

    def target(self, n: int, generator: torch.Generator) -> Tensor:
        """Return ``(n, dim)`` samples."""
        component = torch.randint(0, len(self.means), (n,), generator=generator)
        return self.means[component] + 0.5 * torch.randn(n, self.dim, generator=generator)


def make(kind: str, dim: int, cost: str) -> ResidualMLP | StructuredMap:
    """Return the map, at its start."""
    if kind == "free":
        return ResidualMLP(dim, (64, 64), start="mean")
    return StructuredMap(dim, cost, (64, 64), potential=kind == "potential", start="mean")


def train(kind: str, cost: str, weight: float, seed: int, arguments: argparse.Namespace) -> list[Measurement]:
    """Return the measurements along a training."""
    torch.manual_seed(seed)
    task, draws = Task(arguments.dim, seed), torch.Generator().manual_seed(seed)
    held_out = torch.Generator().manual_seed(10_000 + seed)
    test = task.source(HELD_OUT, held_out), task.target(HELD_OUT, held_out)
    net, ground = make(kind, arguments.dim, cost), costs.resolve(cost)
    source, target = task.source(2000, draws), task.target(2000, draws)
    net.start(source, target)
    options = {
        "fitting_cost": costs.SqEuclidean(), "fitting_epsilon": 0.05 * costs.SqEuclidean().mean(target, target),
        "cost": ground, "gap_epsilon": 0.01 * ground.mean(source, target), "reach": None, "solver": "auto",
    }  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    measurements = []
    for step in range(1, arguments.steps + 1):
        source, target = task.source(256, draws), task.target(256, draws)
        mapped = net(source)
        if weight:
            divergence, gap = divergence_and_gap(source, mapped, target, **options)
            loss = divergence + weight * gap
        else:
            loss = sinkhorn_divergence(mapped, target, epsilon=options["fitting_epsilon"])
        if kind == "field":
            loss = loss + 0.01 * conservativity(net.field, source)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            measurements.append(measure(net, *test, ground, options["fitting_epsilon"]))
    return measurements


@torch.no_grad()
def measure(net: nn.Module, source: Tensor, target: Tensor, cost: costs.Cost, epsilon: float) -> Measurement:
    """Return divergence, and gap in percent of the mean cost, in double."""
    net.eval()
    mapped = net(source).double()
    net.train()
    source, target = source.double(), target.double()
    gap = monge_gap(source, mapped, cost=cost, solver="exact") / cost.paired(source, mapped).mean()
    return Measurement(float(sinkhorn_divergence(mapped, target, epsilon=epsilon)), 100 * float(gap))


def spread(values: list[float], digits: int) -> str:
    """Return mean ± standard deviation."""
    x = torch.tensor(values)
    return f"{x.mean():.{digits}f} ± {x.std():.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def main() -> None:
    """Train all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", nargs="+", default=["pnorm(p=1.5)", "pnorm(p=3)", "elastic(lam=0.5)"])
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 1.0], help="weights of the Monge gap")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--dim", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("cost", "gap weight", "map", "final divergence", "final gap, %", "level", "gap at it, %", "s a fit")
    for cost, weight in itertools.product(arguments.costs, arguments.weights):
        runs: dict[str, list[list[Measurement]]] = {kind: [] for kind in MAPS}
        seconds = dict.fromkeys(MAPS, 0.0)
        for seed, kind in itertools.product(arguments.seeds, MAPS):
            start = time.perf_counter()
            runs[kind].append(train(kind, cost, weight, seed, arguments))
            seconds[kind] += (time.perf_counter() - start) / len(arguments.seeds)
        levels = [max(min(m.divergence for m in run) for run in same) for same in zip(*runs.values(), strict=True)]
        for kind in MAPS:
            at_level = [
                next(m.gap for m in run if m.divergence <= level) for run, level in zip(runs[kind], levels, strict=True)
            ]
            table.add_row(
                cost, f"{weight:g}", kind, spread([run[-1].divergence for run in runs[kind]], 3),
                spread([run[-1].gap for run in runs[kind]], 2), spread(levels, 3), spread(at_level, 2),
                f"{seconds[kind]:.0f}",
            )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
