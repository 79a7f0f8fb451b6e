"""The paper's figure 2 on its own subject: F1 on MNIST, how far the weights travel in the initial high-rate phase.

    python -m benchmarks.science.diffusion_mnist --data mnist_full.npz --results runs.jsonl  # train, then the tables
    python -m benchmarks.science.diffusion_mnist --results runs.jsonl --figure docs/images/diffusion_mnist.png
    python -m benchmarks.science.diffusion_mnist --data mnist_full.npz --probe

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
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_gap import GhostBatchNorm, UltraSlowDiffusion
from lightning_gap.demo.f1 import F1
from lightning_gap.diffusion import estimate_alpha, fit_diffusion

PLAIN, ADAPTED = (64, 256, 1024, 4096), (256, 1024, 4096)
REFERENCE_BATCH, RATE, EPOCHS = 128, 0.1, 10
# Until here the clipped gradients of the first updates add up, and the walk is no walk yet.
BURST = 20


class Classifier(LightningModule):
    """The paper's fully connected network and its optimizer."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.net = F1()

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


def train(data: dict[str, Tensor], batch: int, adapted: bool, seed: int) -> dict[str, Any]:
    seed_everything(seed, verbose=False)
    model = Classifier(RATE * (batch / REFERENCE_BATCH) ** 0.5 if adapted else RATE)
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


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def across(trace: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    """Return how far the weights went along −w_0 and across it: ‖w_0‖ − ‖w_t‖ cos and ‖w_t‖ sin."""
    start = trace["distance"][0] / trace["relative_distance"][0]
    both = list(zip(trace["weight_norm"], trace["cosine"], strict=True))
    return [start - w * c for w, c in both], [w * (1 - c * c) ** 0.5 for w, c in both]


def spread(values: list[float], digits: int) -> str:
    return (
        f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"
        if len(values) > 1
        else f"{values[0]:.{digits}f}"
    )


def tables(runs: list[dict[str, Any]]) -> None:
    names = "run | batch | seeds | updates | distance | b of a + b·log t | R² | p of c·tᵖ | R² | weight of log"
    print(f"| {names} | accuracy, % |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, batch, group in settings(runs):
        traces = [run["trace"] for run in group]
        fits = [fit_diffusion(trace["updates"], trace["distance"]) for trace in traces]
        cells = [
            *(name, batch, len(group), round(fits[0].last_update)),
            spread([trace["distance"][-1] for trace in traces], 2),
            spread([fit.log_slope for fit in fits], 2),
            spread([fit.log_r2 for fit in fits], 3),
            spread([fit.power_exponent for fit in fits], 3),
            spread([fit.power_r2 for fit in fits], 3),
            spread([fit.log_weight for fit in fits], 2),
            spread([run["accuracy"] for run in group], 2),
        ]
        print("| " + " | ".join(map(str, cells)) + " |")
    print(f"\nAlong −w_0, what weight decay alone would do, and across w_0 from update {BURST} on:\n")
    print("| run | batch | along −w_0 | by weight decay | across w_0 | b | R² | p | R² |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, batch, group in settings(runs):
        traces = [run["trace"] for run in group]
        parts = [across(trace) for trace in traces]
        start = traces[0]["distance"][0] / traces[0]["relative_distance"][0]
        rate = RATE * (batch / REFERENCE_BATCH) ** 0.5 if name == "adapted" else RATE
        decayed = start * (1 - np.exp(-rate * 1e-4 / (1 - 0.9) * traces[0]["updates"][-1]))
        late = sum(t < BURST for t in traces[0]["updates"])
        fits = [
            fit_diffusion(trace["updates"][late:], beside[late:], minimum_decades=0.5)
            for trace, (_, beside) in zip(traces, parts, strict=True)
        ]
        cells = [
            *(name, batch, spread([along[-1] for along, _ in parts], 1), f"{decayed:.1f}"),
            spread([beside[-1] for _, beside in parts], 1),
            spread([fit.log_slope for fit in fits], 2),
            spread([fit.log_r2 for fit in fits], 3),
            spread([fit.power_exponent for fit in fits], 3),
            spread([fit.power_r2 for fit in fits], 3),
        ]
        print("| " + " | ".join(map(str, cells)) + " |")


def probe(data: dict[str, Tensor], seeds: list[int]) -> None:
    """Print α of the random potential around the initial weights, on 256 images."""
    images, labels = data["train_images"][:256], data["train_labels"][:256]
    for radius in (10.0, 50.0):
        for seed in seeds:
            seed_everything(seed, verbose=False)
            model = Classifier(RATE)
            fit = estimate_alpha(
                model, lambda model: nn.functional.cross_entropy(model.net(images), labels), radius=radius, seed=seed
            )
            low, high = fit.alpha_interval
            print(f"radius {radius:g}, seed {seed}: α = {fit.alpha:.2f} ({low:.2f} to {high:.2f}), R² {fit.r2:.3f}")


def settings(runs: list[dict[str, Any]]) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    for name, batches in (("plain", PLAIN), ("adapted", ADAPTED)):
        for batch in batches:
            group = [run for run in runs if (run["batch"], run["adapted"]) == (batch, name == "adapted")]
            if group:
                yield name, batch, group


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, batch, group in settings(runs):
        colour = f"C{PLAIN.index(batch)}"
        for ax in [left, right] if batch == min(PLAIN) else [left if name == "plain" else right]:
            for run in group:
                label = f"batch {batch}" if run is group[0] else None
                ax.plot(run["trace"]["updates"], run["trace"]["distance"], color=colour, label=label, linewidth=1)
    left.set(title="learning rate 0.1", xscale="log", xlabel="updates t", ylabel="‖wₜ − w₀‖")
    right.set(title="0.1·√(batch / 128), ghost batches of 128", xscale="log", xlabel="updates t")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="train what is missing from the results on these images")
    parser.add_argument("--results", type=Path, default=Path("runs.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--figure", type=Path, help="where to write the figure")
    parser.add_argument("--probe", action="store_true", help="only probe the loss around the initial weights")
    options = parser.parse_args()
    if options.probe:
        probe(load(options.data), options.seeds)
        return
    if options.data:
        train_missing(options.data, options.results, options.seeds)
    runs = read(options.results)
    tables(runs)
    if options.figure:
        draw(runs, options.figure)


if __name__ == "__main__":
    main()
