"""A map's fit to held-in samples by an unbiased distance of batches, and what held-out ones say of it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_gap.monge.maps.descent import drawn_rows, minimize
from lightning_gap.monge.maps.starts import StartPair, sides_of
from lightning_gap.monge.ot.costs import Cost, Geodesic, SqEuclidean
from lightning_gap.monge.ot.minibatch_energy import minibatch_energy_distance

__all__ = ["energy_gain", "fit_energy", "held_out_images", "keep_if_nearer"]

_STEPS, _LR, _WARM_UP, _BATCH, _SHARE = 150, 3e-4, 20, 1024, 0.05
_ROUNDS = 5  # looks at the held-out samples
_BLOCK = 1024  # rows of distances to all points


def _images(net: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    images: Tensor = net(x) if condition is None else net(x, condition.expand(len(x), *condition.shape))
    return images


@torch.no_grad()
def held_out_images(net: nn.Module, held: Sequence[StartPair]) -> list[Tensor]:
    """Return the images of the held-out source of each condition."""
    like = next(net.parameters())
    return [_images(net, pair.source.to(like), pair.condition).double() for pair in held]


def _mean_distances(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance of each point to the other measure, for both measures, in blocks of rows."""
    out, back = [], torch.zeros_like(b)
    for start in range(0, len(x), _BLOCK):
        distances = torch.cdist(x[start : start + _BLOCK], y)
        out.append(distances @ b)
        back += a[start : start + _BLOCK] @ distances
    return torch.cat(out), back


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
            across, back = _mean_distances(images, y, a, b)
            own = _mean_distances(images, images, a, a)[0] / (1 - a)
            rows.append(2 * across - 2 * own)
            columns.append(2 * back)
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
    like = next(net.parameters())
    ground: Cost = cost if isinstance(cost, Geodesic) else SqEuclidean()
    sizes = [_SHARE * ground.mean(pair.target[:_BATCH].to(like), pair.target[:_BATCH].to(like)) for pair in pairs]
    generator = torch.Generator().manual_seed(0)
    best = held_out_images(net, held)

    def loss(step: int) -> Tensor:
        pair, epsilon = pairs[step % len(pairs)], sizes[step % len(pairs)]
        sides = ((pair.source, pair.source_weights), (pair.target, pair.target_weights))
        x, y = (side[drawn_rows(side, weights, _BATCH, generator)].to(like) for side, weights in sides)
        images = _images(net, x, pair.condition)
        return minibatch_energy_distance(images, y, cost=ground, epsilon=epsilon, tolerance=1e-2)

    def better() -> bool:
        nonlocal best
        now = held_out_images(net, held)
        if nearer := energy_gain(best, now, held)[0] > 0:
            best = now
        return nearer

    minimize(net, loss, steps=steps * len(pairs), lr=_LR, warm_up=_WARM_UP - 1, better=better, looks=_ROUNDS)


@torch.no_grad()
def keep_if_nearer(net: nn.Module, held: Sequence[StartPair], fit: Callable[[], None]) -> None:
    """Fit a map, and take that back unless its held-out images come nearer by more than a standard error."""
    before, images = [p.detach().clone() for p in net.parameters()], held_out_images(net, held)
    fit()
    gain, error = energy_gain(images, held_out_images(net, held), held)
    if not gain > error:  # a comparison with NaN is false
        for p, kept in zip(net.parameters(), before, strict=True):
            p.copy_(kept)
