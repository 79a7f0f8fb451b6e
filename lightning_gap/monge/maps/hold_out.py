"""How much of a network a map takes beside the Gaussian map: as much as held-out samples tell apart from it."""

from typing import Protocol

import torch
from torch import Tensor

from lightning_gap.monge.maps.energy_fit import energy_gain
from lightning_gap.monge.maps.semidual import ConvexMap, HeldOutSamples, difference, mean_semidual, semidual_values
from lightning_gap.monge.maps.starts import StartPair

__all__ = ["MOST_BY_ENERGY", "SharedMap", "choose_share", "held_samples", "hold_out"]

# Of the samples one in so many is held out, but no more than these, or one in so many more of very many; never more
# than the last, whose pairs are all looked at; below so many samples, or so many a dimension, none is.
_ONE_IN, _MOST, _ONE_IN_MANY, _EVER, _LEAST, _LEAST_A_DIMENSION = 5, 1024, 16, 8192, 100, 4
# Energy distances tell less apart than semi-duals, in many dimensions by far.
MOST_BY_ENERGY = 4096
_SHARES = (0.25, 0.5, 0.75, 1.0)


class SharedMap(ConvexMap, Protocol):
    """A convex map that is the mean of a network's and of a Gaussian map."""

    share: Tensor


def held_samples(pair: StartPair) -> HeldOutSamples:
    """Return a pair of held-out samples without its condition."""
    return HeldOutSamples(pair.source, pair.target, (pair.source_weights, pair.target_weights))


def hold_out(pair: StartPair, most: int = _MOST) -> tuple[StartPair | None, StartPair]:
    """Return some samples of both sides, and the others; ``None`` and all where there are too few to hold any out.

    Args:
        pair: The samples.
        most: No more of a side are held out, unless there are very many: then up to 8192.
    """
    sides = []
    for points, weights in ((pair.source, pair.source_weights), (pair.target, pair.target_weights)):
        kept = slice(None) if weights is None else weights > 0
        sides.append((points[kept], None if weights is None else weights[kept]))
    fewest, dim = min(len(points) for points, _ in sides), pair.source.shape[1]
    if fewest < max(_LEAST, _LEAST_A_DIMENSION * dim):
        return None, pair
    parts: list[tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]] = []
    for seed, (points, weights) in enumerate(sides):
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed)).to(points.device)
        count = min(len(points) // _ONE_IN, max(most, min(len(points) // _ONE_IN_MANY, _EVER)))
        held, rest = order[:count], order[count:]
        parts.append(
            ((points[held], None if weights is None else weights[held]),
             (points[rest], None if weights is None else weights[rest] / weights[rest].sum()))
        )  # fmt: skip
    ((x, a), (x_rest, a_rest)), ((y, b), (y_rest, b_rest)) = parts
    rest_pair = pair._replace(source=x_rest, target=y_rest, source_weights=a_rest, target_weights=b_rest)
    return pair._replace(source=x, target=y, source_weights=a, target_weights=b), rest_pair


@torch.no_grad()
def choose_share(net: SharedMap, held: HeldOutSamples) -> float:
    """Set and return the network's share: that of the least held-out semi-dual, or 0 within a standard error of it.

    Or 0 where its images are no nearer to the held-out target, by the energy distance, than the Gaussian map's.

    The semi-dual is convex in the share, and a mean of convex potentials is one.
    """
    like = net.share
    held = HeldOutSamples(held.source.to(like), held.target.to(like), held.weights)
    scored = {}
    for share in (0.0, *_SHARES):
        like.fill_(share)
        scored[share] = semidual_values(net, held.source, held.target)
    best = min(_SHARES, key=lambda share: mean_semidual(scored[share], held))
    gain, error = difference(scored[0.0], scored[best], held)
    pairs = [StartPair(held.source, held.target, None, *held.weights)]
    images = []
    for share in (0.0, best):
        like.fill_(share)
        images.append([net(held.source).double()])
    nearer = energy_gain(images[0], images[1], pairs)[0]
    chosen = best if gain > error and nearer > 0 else 0.0  # a comparison with NaN is false
    like.fill_(chosen)
    return chosen
