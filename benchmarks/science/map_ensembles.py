"""Ensembles of maps: whether their spread tells of their error.

    python -m benchmarks.science.map_ensembles [--dims 2 8] [--maps residual brenier] [--seeds 0 1 2] [--steps 200]

The source is a mixture of two Gaussians, one of them rare, the truth the gradient of a random convex function in closed
form. Five maps see 400 samples of each side, or a bootstrap of them; on 1000 other samples their spread is compared
with the distance of their mean image from the true one: Spearman's correlation over the samples, and root mean squares.
Means and standard deviations are over seeds. One thread.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch import seed_everything
from scipy.stats import spearmanr
from torch import Tensor

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import BrenierMap, ResidualMLP, fit_ensemble

SAMPLES, HELD_OUT = 400, 1000


def free(dim: int) -> MongeMap:
    """Return a map from the Gaussian map on."""
    return MongeMap(map=ResidualMLP(dim, (64, 64), start="gaussian"))


def convex(dim: int) -> MongeMap:
    """Return the gradient of a convex network."""
    return MongeMap(map=BrenierMap(dim, (32, 32)), gap_weight=0, optimizer=partial(torch.optim.Adam, lr=1e-2))


MAPS = {"residual": free, "brenier": convex}


def truth(dim: int, seed: int) -> Callable[[Tensor], Tensor]:
    """Return the gradient of a random convex function, a quadratic and log cosh of linear ones."""
    generator = torch.Generator().manual_seed(100 + seed)
    slopes = torch.randn(3 * dim, dim, generator=generator) * 1.2
    offsets, sizes = torch.randn(3 * dim, generator=generator), torch.rand(3 * dim, generator=generator) / dim
    return lambda x: 0.4 * x + (torch.tanh(x @ slopes.mT + offsets) * sizes) @ slopes + 1


def measured(kind: str, dim: int, bootstrap: bool, seed: int, steps: int) -> list[float]:
    """Return correlation, spread, error of the mean, error of a map, and CPU seconds."""
    began, image, generator = time.process_time(), truth(dim, seed), torch.Generator().manual_seed(seed)

    def source(n: int) -> Tensor:
        rare = (torch.rand(n, 1, generator=generator) < 0.1).float()
        return torch.randn(n, dim, generator=generator) * 0.7 + rare * 2.5

    x, y = source(SAMPLES), image(source(SAMPLES))
    held_out = source(HELD_OUT)
    seed_everything(seed, verbose=False)
    data = SamplesDataModule(x, y, batch_size=200, val_fraction=0.0)
    ensemble = fit_ensemble(partial(MAPS[kind], dim), data, n=5, bootstrap=bootstrap, max_steps=steps)
    error = (ensemble.transport(held_out) - image(held_out)).norm(dim=1)
    spread = ensemble.spread(held_out)
    each = (ensemble.images(held_out) - image(held_out)).norm(dim=2)
    sizes = [float(values.square().mean().sqrt()) for values in (spread, error, each)]
    return [float(spearmanr(spread, error)[0]), *sizes, time.process_time() - began]


def main() -> None:
    """Print a row for each dimension, map and way to differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--maps", nargs="+", choices=MAPS, default=list(MAPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| d | map | bootstrap | Spearman | spread | error of the mean | error of a map | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for dim in given.dims:
        for kind in given.maps:
            for bootstrap in (True, False):
                rows = torch.tensor([measured(kind, dim, bootstrap, seed, given.steps) for seed in given.seeds])
                mean, std = rows.mean(0), rows.std(0)
                print(
                    f"| {dim} | {kind} | {'yes' if bootstrap else 'no'} | {mean[0]:.2f} ± {std[0]:.2f} | "
                    f"{mean[1]:.3f} | {mean[2]:.3f} ± {std[2]:.3f} | {mean[3]:.3f} | {mean[4]:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
