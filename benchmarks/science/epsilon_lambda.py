"""What ε and λ do to a map: the tables of docs/howto_epsilon_lambda.md.

A standard Gaussian in the plane to two half moons, the Euclidean cost, one training a cell:
``python -m benchmarks.science.epsilon_lambda [--steps 200] [--seeds 0 1 2]``.
"""

import argparse
import logging
import statistics
import warnings

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lightning_gap import MongeMap, SamplesDataModule, monge_gap
from lightning_gap.monge import MapScores

WEIGHTS = (0.0, 0.01, 0.1, 1.0, 10.0)
EPSILONS = (1.0, 0.2, 0.05, 0.01)


def gaussian(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=generator)


def moons(n: int, generator: torch.Generator) -> Tensor:
    angle = torch.pi * torch.rand(n, generator=generator)
    side = torch.randint(2, (n,), generator=generator)
    sign = 1.0 - 2.0 * side
    points = torch.stack([torch.cos(angle) + side, sign * (torch.sin(angle) - 0.25)], dim=1)
    return 2.5 * points + 0.1 * torch.randn(n, 2, generator=generator)


def train(seed: int, steps: int, **options: float) -> dict[str, float]:
    seed_everything(seed, verbose=False)
    generator = torch.Generator().manual_seed(seed)
    source, target = gaussian(4000, generator), moons(4000, generator)
    model = MongeMap(dim=2, cost="euclidean", hidden=(64, 64), **options)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, SamplesDataModule(source, target, batch_size=256, val_fraction=0, seed=seed))
    held, fresh, again = gaussian(1000, generator), moons(1000, generator), moons(1000, generator)
    mapped = model.transport(held)
    scores = MapScores(cost="euclidean", fitting_epsilon=0.05)
    scores.update(held, mapped, fresh, target_again=again)
    found = {name: float(value) for name, value in scores.compute().items()}
    exact = float(monge_gap(held, mapped, cost="euclidean", solver="exact"))
    paid = float((held - mapped).norm(dim=1).mean())
    return {
        "divergence": found["sinkhorn_divergence"],
        "floor": found["sinkhorn_divergence_floor"],
        "gap, %": 100 * exact / paid,
        "displacement": paid,
    }


def table(name: str, values: tuple[float, ...], seeds: list[int], steps: int) -> None:
    head = f"{name} | divergence | floor | gap, % of what the map pays | displacement"
    print(f"\n| {head} |\n| --- | --- | --- | --- | --- |")
    for value in values:
        runs = [train(seed, steps, **{name: value}) for seed in seeds]
        cells = []
        for key in runs[0]:
            found = [run[key] for run in runs]
            cells.append(f"{statistics.mean(found):.3f} ± {statistics.stdev(found) if len(found) > 1 else 0:.3f}")
        print(f"| {value:g} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    table("gap_weight", WEIGHTS, options.seeds, options.steps)
    table("relative_fitting_epsilon", EPSILONS, options.seeds, options.steps)


if __name__ == "__main__":
    main()
