"""Certificates of maps against the truth: does the bound hold, and how far above is it?

    python -m benchmarks.science.certificates --data FOLDER [--dims 2 4 8 16 32] [--seeds 0 1 2] [--samples 4096]

Pairs are made from ``train_x`` and ``train_y`` of ``w2_mix3to10_D{D}.npz`` in ``--data``: samples of a mixture of three
Gaussians that is fitted to ``train_x``, and of its image under a convex network that is fitted to both, which is the
truth. ``test_x`` and ``test_map`` are not read. Maps: the identity, the Gaussian map, and plan starts on 256, 2048 and
8192 samples. Rows are appended to ``--out`` as they come: L2-UVP by the truth (``error``), its estimate, the bound, the
proven bound, and the bound over the error; and the same of the suboptimality of linear maps, whose truth is a closed
form.
"""

import argparse
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from benchmarks.logs import RESULTS, append
from lightning_gap.monge import BrenierMap, error_certificate, gaussian_map, suboptimality

STARTS: Mapping[str, dict[str, int]] = {
    "plan of 256": {"plan_samples": 256, "plan_steps": 200},
    "plan of 2048": {"plan_samples": 2048, "plan_steps": 1000},
    "plan of 8192": {"plan_samples": 8192, "plan_steps": 2000},
}


def pair(data: Path, dim: int, seed: int, held_out: int) -> tuple[dict[str, Tensor], BrenierMap]:
    """Return samples to train on and held-out ones, not paired, and the true map."""
    with np.load(data / f"w2_mix3to10_D{dim}.npz") as file:
        x, y = (torch.from_numpy(file[name][4096 * seed : 4096 * (seed + 1)]) for name in ("train_x", "train_y"))
    torch.manual_seed(seed)
    mixture = GaussianMixture(3, random_state=seed).fit(x.double().numpy())
    true = BrenierMap(dim, (96, 96), start="plan", plan_samples=4096, plan_steps=1500)
    true.start(x, y)
    rng = np.random.default_rng(seed)

    def draw(n: int) -> Tensor:
        mixture.random_state = int(rng.integers(2**31))
        return torch.from_numpy(rng.permutation(mixture.sample(n)[0])).float()

    with torch.no_grad():
        sets = {"x": draw(16384), "y": true(draw(16384)), "held_x": draw(held_out), "held_y": true(draw(held_out))}
    return sets, true


def w2(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each dimension, seed and map."""
    for seed in args.seeds:
        for dim in args.dims:
            sets, true = pair(args.data, dim, seed, args.samples)
            held, y = sets["held_x"], sets["held_y"]
            A, b = gaussian_map(sets["x"], sets["y"])
            maps: dict[str, BrenierMap | None] = {"identity": None, "Gaussian": None}
            for name, options in STARTS.items():
                net = BrenierMap(dim, start="plan", **options)
                net.start(sets["x"], sets["y"])
                maps[name] = net
            for name, net in maps.items():
                if net is not None:
                    mapped = net(held).detach()
                else:
                    mapped = held if name == "identity" else (held.double() @ A + b).float()
                error = float((mapped - true(held)).detach().double().square().sum(1).mean())
                start = time.process_time()
                found = error_certificate(held, mapped, y, convex=net, max_samples=args.samples)
                seconds = time.process_time() - start
                truth = 100 * error / found.variance
                yield {
                    "what": "L2-UVP", "D": dim, "seed": seed, "map": name, "samples": found.samples, "error": truth,
                    "estimate": found.value, "bound": found.upper, "ratio": found.upper / truth, "proven": found.proven,
                    "holds": truth <= found.upper, "seconds": seconds,
                }  # fmt: skip


def linear(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each dimension and seed: rotated and stretched Gaussians, by the squared Euclidean cost."""
    for dim in args.dims:
        for seed in args.seeds:
            rng = np.random.default_rng(seed)
            root = torch.from_numpy(rng.normal(size=(dim, dim)) / math.sqrt(dim) + 0.5 * np.eye(dim))
            skew = torch.from_numpy(rng.normal(size=(dim, dim)) / math.sqrt(dim))
            A = 1.5 * torch.matrix_exp(skew - skew.mT)
            x = torch.from_numpy(rng.normal(size=(args.samples, dim))) @ root.mT
            paid = float(((A - torch.eye(dim)) @ root).square().sum())
            best = float(
                root.square().sum() + (A @ root).square().sum() - 2 * torch.linalg.svdvals(root.mT @ A @ root).sum()
            )
            found = suboptimality(x, x @ A.mT, max_samples=args.samples)
            truth = 100 * (paid - best) / paid
            yield {
                "what": "suboptimality", "D": dim, "seed": seed, "samples": found.samples, "error": truth,
                "estimate": found.value, "bound": found.upper, "holds": truth <= found.upper,
            }  # fmt: skip


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=4096, help="held-out samples of each set")
    parser.add_argument("--out", type=Path, default=RESULTS / "certificates.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for rows in (linear(args), w2(args)):
        for row in rows:
            append(args.out, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
