"""The random potential around the first weights: how the loss spreads with the distance (the paper's appendix B).

    python -m benchmarks.science.large_batch.potential f1_fashion --path FOLDER --radius 30
    python -m benchmarks.science.large_batch.potential resnet44_cifar10 --path cifar10_jpeg.npz --radius 10

Images are the first of the training set in the order of the seed, not augmented; BatchNorm normalizes by the batch.
"""

import argparse
from pathlib import Path

import torch
import yaml
from lightning.pytorch import seed_everything
from torch import nn

from benchmarks.logs import RESULTS, append, read
from benchmarks.science.large_batch.images import Images
from benchmarks.science.large_batch.networks import C1, F1, ResNet44
from lightning_gap.diffusion import estimate_alpha

NETWORKS = {
    "f1_mnist": (F1, "F1, MNIST"),
    "f1_fashion": (F1, "F1, Fashion-MNIST"),
    "c1_cifar10": (C1, "C1, CIFAR-10"),
    "resnet44_cifar10": (ResNet44, "ResNet44, CIFAR-10"),
}


def probe(kind: str, path: str, radius: float, images: int, samples: int, seed: int) -> dict[str, object]:
    """Return what one probe found, as plain numbers."""
    network, name = NETWORKS[kind]
    options = yaml.safe_load((Path(__file__).parent / f"{kind}.yaml").read_text())["data"] | {"path": path}
    data = Images(**options, seed=seed)
    data.setup("fit")
    seed_everything(seed, verbose=False)
    module = network()
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:images].tolist()
    x, y = data.train.as_they_are(rows)
    with torch.random.fork_rng():
        fit = estimate_alpha(
            module, lambda net: nn.functional.cross_entropy(net(x), y), radius=radius, samples=samples, seed=seed
        )
    facts = {"name": f"{name}, {radius:g}", "seed": seed, "images": images, "samples": samples}
    facts |= {"gamma": fit.gamma, "gamma_interval": fit.gamma_interval, "alpha": fit.alpha, "r2": fit.r2}
    return facts | {"radii": fit.radii, "std": fit.std, "loss_at_start": fit.loss_at_start}


def main() -> None:
    """Probe, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--path", required=True, help="the images, as in the configurations")
    parser.add_argument("--radius", type=float, required=True, help="the largest distance")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--logs", type=Path, default=RESULTS)
    options = parser.parse_args()
    log = options.logs / "large_batch_potential.jsonl"
    for seed in options.seeds:
        key = {"network": options.network, "radius": options.radius, "seed": seed}
        if any(key.items() <= row.items() for row in read(log)):
            continue
        found = probe(options.network, options.path, options.radius, options.images, options.samples, seed)
        append(log, key | found)
        print(f"{found['name']}, seed {seed}: γ {found['gamma']:.2f}, R² {found['r2']:.3f}", flush=True)


if __name__ == "__main__":
    main()
