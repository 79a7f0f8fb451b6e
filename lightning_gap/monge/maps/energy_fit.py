"""A map's fit to held-in samples by an unbiased distance of batches, and what held-out ones say of it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_gap.monge.maps.starts import StartPair, sides_of
from lightning_gap.monge.ot.costs import Cost, Geodesic, SqEuclidean
from lightning_gap.monge.ot.minibatch_energy import minibatch_energy_distance

__all__ = ["energy_gain", "fit_energy", "held_out_images"]

_STEPS, _LR, _WARM_UP, _BATCH, _SHARE = 150, 3e-4, 20, 1024, 0.05
_ROUNDS = 5  # looks at the held-out samples


def _images(net: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    images: Tensor = net(x) if condition is None else net(x, condition.expand(len(x), *condition.shape))
    return images


@torch.no_grad()
def held_out_images(net: nn.Module, held: Sequence[StartPair]) -> list[Tensor]:
    """Return the images of the held-out source of each condition."""
    like = next(net.parameters())
    return [_images(net, pair.source.to(like), pair.condition).double() for pair in held]


@torch.no_grad()
def energy_gain(before: Sequence[Tensor], after: Sequence[Tensor], held: Sequence[StartPair]) -> tuple[float, float]:
    r"""Return by how much images are nearer to the held-out target than others, and the standard error of that.

    The unbiased energy distance (U-statistic) :math:`2 E|t - y| - E|t - t'|`, the mean over the conditions; its error
    by the projections on single samples.
    """
    gain, variance = 0.0, 0.0
    for pair, *both in zip(held, before, after, strict=True):
        (_, a_given), (y, b_given) = sides_of(pair)
        y = y.double()
        a, b = (
            y.new_full((count,), 1 / count) if w is None else w.double()
            for w, count in ((a_given, len(both[0])), (b_given, len(y)))
        )
        rows, columns, selves = [], [], []
        for images in both:
            across = torch.cdist(images, y)
            own = torch.cdist(images, images) @ a / (1 - a)
            rows.append(2 * across @ b - 2 * own)
            columns.append(2 * a @ across)
            selves.append(a @ own)
        x_part, y_part = rows[0] - rows[1], columns[0] - columns[1]
        gain += float(b @ y_part - (selves[0] - selves[1])) / len(held)
        for w, part in ((a, x_part), (b, y_part)):
            variance += float(w.square() @ (part - w @ part).square()) / len(held) ** 2
    return gain, math.sqrt(variance)


def fit_energy(
    net: nn.Module, pairs: Sequence[StartPair], held: Sequence[StartPair], cost: Cost, *, steps: int = _STEPS
) -> None:
    """Take a few steps by the minibatch energy distance, and keep the weights that held-out samples favour."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    like = parameters[0]
    ground: Cost = cost if isinstance(cost, Geodesic) else SqEuclidean()
    sizes = [_SHARE * ground.mean(pair.target[:_BATCH].to(like), pair.target[:_BATCH].to(like)) for pair in pairs]
    kept, best = [p.detach().clone() for p in parameters], held_out_images(net, held)
    optimizer, generator = torch.optim.Adam(parameters, lr=_LR), torch.Generator().manual_seed(0)
    steps *= len(pairs)
    with torch.inference_mode(False), torch.enable_grad():
        for step in range(steps):
            rate = _LR * min(1, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = rate
            pair = pairs[step % len(pairs)]
            x = _batch(pair.source, pair.source_weights, generator).to(like)
            y = _batch(pair.target, pair.target_weights, generator).to(like)
            images = _images(net, x, pair.condition)
            epsilon = sizes[step % len(pairs)]
            loss = minibatch_energy_distance(images, y, cost=ground, epsilon=epsilon, tolerance=1e-2)
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = gradient
            optimizer.step()
            if (step + 1) % max(1, steps // _ROUNDS) == 0 or step + 1 == steps:
                now = held_out_images(net, held)
                if energy_gain(best, now, held)[0] > 0:
                    best = now
                    for keep, p in zip(kept, parameters, strict=True):
                        keep.copy_(p.detach())
        with torch.no_grad():
            for keep, p in zip(kept, parameters, strict=True):
                p.grad = None
                p.copy_(keep)


def _batch(points: Tensor, weights: Tensor | None, generator: torch.Generator) -> Tensor:
    """Return random rows, by weight."""
    size = min(_BATCH, len(points))
    if weights is None:
        rows = torch.randint(len(points), (size,), generator=generator)
    else:
        rows = torch.multinomial(weights.double().cpu(), size, replacement=True, generator=generator)
    return points[rows.to(points.device)]
