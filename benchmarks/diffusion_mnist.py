"""The paper's figure 2 on its own subject: F1 on MNIST, how far the weights travel in the initial high-rate phase.

    python benchmarks/diffusion_mnist.py --data mnist_full.npz --results runs.jsonl            # train, then the tables
    python benchmarks/diffusion_mnist.py --results runs.jsonl --figure docs/images/diffusion_mnist.png

F1 is five layers of 512 with BatchNorm and ReLU; SGD with momentum 0.9, weight decay 1e-4, gradients clipped to norm 5,
ten epochs at the first learning rate, as in the authors' code. "plain" keeps 0.1 for every batch; "adapted" multiplies
it by √(batch / 128) and normalizes over ghost batches of 128. Runs that are in the results file already are not
repeated. ``--data`` is an ``.npz`` of ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_gap import GhostBatchNorm, UltraSlowDiffusion

PLAIN, ADAPTED = (64, 256, 1024, 4096), (256, 1024, 4096)
REFERENCE_BATCH, RATE, EPOCHS = 128, 0.1, 10


class F1(LightningModule):
    """The paper's fully connected network."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        layers: list[nn.Module] = []
        for width in (784, 512, 512, 512, 512):
            layers += [nn.Linear(width, 512), nn.BatchNorm1d(512), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(512, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the authors' regime."""
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, weight_decay=1e-4)


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """The training images in a new order each epoch, whole batches at once."""

    def __init__(self, images: Tensor, labels: Tensor, size: int) -> None:
        self.images, self.labels, self.size = images, labels, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.images)).split(self.size):
            yield self.images[index], self.labels[index]

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)


def load(path: Path) -> dict[str, Tensor]:
    with np.load(path) as arrays:
        data = {name: torch.from_numpy(arrays[name]) for name in arrays}
    for part in ("train", "test"):
        data[f"{part}_images"] = (data[f"{part}_images"].flatten(1) / 255 - 0.1307) / 0.3081
        data[f"{part}_labels"] = data[f"{part}_labels"].long()
    return data


def train(data: dict[str, Tensor], batch: int, adapted: bool, seed: int) -> dict[str, object]:
    seed_everything(seed, verbose=False)
    model = F1(RATE * (batch / REFERENCE_BATCH) ** 0.5 if adapted else RATE)
    diffusion = UltraSlowDiffusion()
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=[GhostBatchNorm(REFERENCE_BATCH), diffusion] if adapted else [diffusion],
        gradient_clip_val=5.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    loader = DataLoader(Batches(data["train_images"], data["train_labels"], batch), batch_size=None)
    trainer.fit(model, loader)
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        right = model.net(data["test_images"]).argmax(1) == data["test_labels"]
    facts = {"batch": batch, "adapted": adapted, "seed": seed, "accuracy": 100 * right.double().mean().item()}
    return facts | {"seconds": seconds, "trace": diffusion.trace}


def train_missing(data: Path, results: Path, seeds: list[int]) -> None:
    done = {(run["batch"], run["adapted"], run["seed"]) for run in read(results)}
    arrays = load(data)
    for seed in seeds:
        for adapted, batches in ((False, PLAIN), (True, ADAPTED)):
            for batch in batches:
                if (batch, adapted, seed) not in done:
                    run = train(arrays, batch, adapted, seed)
                    with results.open("a") as file:
                        file.write(json.dumps(run) + "\n")


def read(results: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="train what is missing from the results on these images")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.data:
        train_missing(options.data, options.results, options.seeds)


if __name__ == "__main__":
    main()
