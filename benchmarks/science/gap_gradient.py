"""How exact the gap's gradient is, and whether a map can be trained by it.

``gradient``: the error of ``monge_gap``'s gradient with respect to the images, by default options, relative to the
gradient of the cost that is paid, against a solution to 1e-9 in float64. Gaussians with a shift, maps from nearly
optimal to noisy.

``training``: maps by the energy distance and the gap on five clusters in 50 dimensions, where an inexact gradient lets
images run away within some thousand updates.

    python -m benchmarks.science.gap_gradient gradient
    python -m benchmarks.science.gap_gradient training --updates 5000 --seeds 5
"""

import argparse
from collections.abc import Callable

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lightning_gap import MongeMap, SamplesDataModule, costs, monge_gap

MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "1.3 x + 3": lambda x, noise: 1.3 * x + 3,
    "0.7 x + 0.5": lambda x, noise: 0.7 * x + 0.5,
    "1.3 x + 3 + 0.001 noise": lambda x, noise: 1.3 * x + 3 + 1e-3 * noise,
    "1.3 x + 3 + 0.1 noise": lambda x, noise: 1.3 * x + 3 + 0.1 * noise,
    "1.3 x + 3 + noise": lambda x, noise: 1.3 * x + 3 + noise,
}
COSTS = ["sqeuclidean", "euclidean", "pnorm(p=1.5)", "elastic"]


def gradient_of(value: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """Return the gradient, in float64."""
    points = points.detach().clone().requires_grad_()
    return torch.autograd.grad(value(points), points)[0].double()


def gradients(n: int) -> None:
    """Print a table of relative errors."""
    print(f"n = {n} | cost | map | true / paid | float64 | float32")
    worst = 0.0
    for d in (2, 10, 50):
        for cost in COSTS:
            for name, mapping in MAPS.items():
                generator = torch.Generator().manual_seed(0)
                x, noise = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
                y = mapping(x, noise)
                paid = gradient_of(lambda t, x=x, cost=cost: costs.resolve(cost).paired(x, t).mean(), y).norm()
                right = gradient_of(
                    lambda t, x=x, cost=cost: monge_gap(x, t, cost=cost, tolerance=1e-9, max_iterations=50_000), y
                )
                errors = []
                for dtype in (torch.float64, torch.float32):
                    found = gradient_of(
                        lambda t, x=x, cost=cost, dtype=dtype: monge_gap(x.to(dtype), t, cost=cost), y.to(dtype)
                    )
                    errors.append(float((found - right).norm() / paid))
                worst = max(worst, *errors)
                print(
                    f"d = {d} | {cost} | {name} | {float(right.norm() / paid):.1e} | {errors[0]:.1e} | {errors[1]:.1e}"
                )
    print(f"largest error {worst:.1e}")


def clusters(d: int = 50) -> tuple[Tensor, Tensor]:
    """Return two sets of cells' like: five clusters, shifted by a random vector."""
    generator = torch.Generator().manual_seed(0)
    scale = 4 * torch.arange(1, d + 1.0) ** -0.5
    centers = torch.randn(5, d, generator=generator) * scale * 1.5

    def draw(n: int) -> Tensor:
        which = torch.randint(5, (n,), generator=generator)
        return centers[which] + torch.randn(n, d, generator=generator) * scale * 0.6

    return draw(300), draw(310) + torch.randn(d, generator=generator) * 1.2


def training(updates: int, seeds: int) -> None:
    """Print where the images are after training, for each seed."""
    source, target = clusters()
    print(f"largest coordinate of the data {float(target.abs().max()):.1f}")
    for seed in range(seeds):
        seed_everything(seed, verbose=False)
        model = MongeMap(dim=source.shape[1], fitting_loss="energy")
        trainer = Trainer(
            max_steps=updates, max_epochs=-1, limit_val_batches=0, logger=False, accelerator="cpu",
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, SamplesDataModule(source, target, batch_size=128, val_fraction=0, seed=seed))
        images = model.transport(source)
        loss = trainer.callback_metrics["lightning_gap/monge/train_loss"]
        print(
            f"seed {seed}: {trainer.global_step} updates, largest coordinate of the images "
            f"{float(images.abs().max()):.1f}, loss {float(loss):.3f}",
            flush=True,
        )


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gradient", "training"])
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--updates", type=int, default=5000)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    gradients(args.n) if args.what == "gradient" else training(args.updates, args.seeds)


if __name__ == "__main__":
    main()
