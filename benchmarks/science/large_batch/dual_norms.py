"""The noise scale in dual norms as micro-batches show it, beside that of every sample's own gradient.

A network of 2 x 64 units on scikit-learn's digits after 500 updates of AdamW at batch 32, whose weights stay then. Half
a minute on one core.

    python -m benchmarks.science.large_batch.dual_norms [--measurements 40]
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_gap.regime import DualNoiseScaleEstimate, DualNormGradients
from lightning_gap.regime.dual_norms import DualNorm, gram_of, matrix_of

WINDOWS = ((4, 32), (4, 128), (16, 32), (64, 8))  # micro-batches, and samples of each
UPDATES, BATCH = 500, 32


def by_samples(net: nn.Module, x: Tensor, y: Tensor, norm: DualNorm) -> tuple[float, float]:
    """Return N and the norm of the mean gradient, from the gradient of every sample by itself."""

    def loss(parameters: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, parameters, (one[None],)), label[None])

    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    every = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    noise = size = 0.0
    for gradients in every.values():
        apart, mean = gradients - gradients.mean(0), gradients.mean(0)
        if norm == "l1":
            noise, size = noise + gradients.std(0).sum().item(), size + mean.abs().sum().item()
            continue
        covariance = sum(gram_of(each).double() for each in apart) / (len(apart) - 1)
        noise += torch.linalg.eigvalsh(covariance).clamp_min(0).sqrt().sum().item()
        size += torch.linalg.svdvals(matrix_of(mean)).sum().item()
    return noise, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measurements", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def backward(samples: int, parts: int = 1) -> None:
        chosen = torch.randint(len(x), (samples,))
        (F.cross_entropy(net(x[chosen]), y[chosen]) / parts).backward()

    for _ in range(UPDATES):
        optimizer.zero_grad()
        backward(BATCH)
        optimizer.step()
    print("| norm | micro-batches × samples | true scale | estimate | bounds | N over the true one |")
    print("| --- | --- | --- | --- | --- | --- |")
    norms: tuple[DualNorm, ...] = ("l1", "nuclear")
    for norm in norms:
        noise, size = by_samples(net, x, y, norm)
        for parts, samples in WINDOWS:
            gradients, estimate = DualNormGradients(), DualNoiseScaleEstimate(decay=0.95, norm=norm)
            for _ in range(options.measurements):
                optimizer.zero_grad()
                gradients.listen([optimizer], norm)
                for _ in range(parts):
                    backward(samples, parts)
                estimate.update(*gradients.moments(samples))
            gradients.remove()
            low, high = estimate.critical_batch_bounds
            share = estimate.total_noise / estimate.measurements / noise
            print(
                f"| {norm} | {parts} × {samples} | {(noise / size) ** 2:.0f} | {estimate.critical_batch_size:.0f} | "
                f"{low:.0f} to {high:.0f} | {share:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
