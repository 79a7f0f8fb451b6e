"""A map's fit to held-in samples by an unbiased distance of batches, and what held-out ones say of it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_gap.monge.maps.hold_out import HeldOutPair
from lightning_gap.monge.maps.starts import StartPair
from lightning_gap.monge.ot.costs import Cost, Geodesic
from lightning_gap.monge.ot.minibatch_energy import minibatch_energy_distance

__all__ = ["energy_gain", "fit_energy"]

_STEPS, _LR, _WARM_UP, _BATCH, _SHARE = 150, 5e-4, 20, 1024, 0.05
_ROUNDS = 5  # looks at the held-out samples


def _images(net: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    images: Tensor = net(x) if condition is None else net(x, condition.expand(len(x), *condition.shape))
    return images


@torch.no_grad()
def energy_gain(
    before: Callable[[HeldOutPair], Tensor], after: Callable[[HeldOutPair], Tensor], held: Sequence[HeldOutPair]
) -> tuple[float, float]:
    r"""Return by how much one map's images are nearer to the target than another's, and the standard error of that.

    The unbiased energy distance (U-statistic) :math:`2 E|t - y| - E|t - t'|` of held-out images, the mean over the
    conditions; its error by the projections on single samples.
    """
    gain, variance = 0.0, 0.0
    for pair in held:
        y, rows, columns, selves = pair.target.double(), [], [], []
        for images in (before(pair).double(), after(pair).double()):
            across = torch.cdist(images, y)
            own = torch.cdist(images, images).sum(1) / (len(images) - 1)
            rows.append(2 * across.mean(1) - 2 * own)
            columns.append(2 * across.mean(0))
            selves.append(own.mean())
        x_part, y_part = rows[0] - rows[1], columns[0] - columns[1]
        gain += float(y_part.mean() - (selves[0] - selves[1])) / len(held)
        variance += float(x_part.var() / len(x_part) + y_part.var() / len(y_part)) / len(held) ** 2
    return gain, math.sqrt(variance)


def fit_energy(
    net: nn.Module, pairs: Sequence[StartPair], held: Sequence[HeldOutPair], cost: Cost, *, steps: int = _STEPS
) -> None:
    """Take a few steps by the minibatch energy distance, and keep the weights that held-out samples favour."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    like = parameters[0]
    ground: Cost | str = cost if isinstance(cost, Geodesic) else "sqeuclidean"
    kept = [p.detach().clone() for p in parameters]

    def images(pair: HeldOutPair) -> Tensor:
        return _images(net, pair.source.to(like), pair.condition)

    with torch.no_grad():
        best = [images(pair) for pair in held]
    optimizer, generator = torch.optim.Adam(parameters, lr=_LR), torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        for step in range(steps):
            rate = _LR * min(1, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.param_groups[0]["lr"] = rate
            pair = pairs[step % len(pairs)]
            x, y = (
                side[torch.randint(len(side), (min(_BATCH, len(side)),), generator=generator).to(side.device)].to(like)
                if weights is None
                else side[_drawn(weights, min(_BATCH, len(side)), generator).to(side.device)].to(like)
                for side, weights in ((pair.source, pair.source_weights), (pair.target, pair.target_weights))
            )
            loss = minibatch_energy_distance(
                _images(net, x, pair.condition), y, cost=ground, relative_epsilon=_SHARE, tolerance=1e-2
            )
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = gradient
            optimizer.step()
            if (step + 1) % max(1, steps // _ROUNDS) == 0 or step + 1 == steps:
                with torch.no_grad():
                    now = [images(pair) for pair in held]
                ours, theirs = dict(zip(map(id, held), now, strict=True)), dict(zip(map(id, held), best, strict=True))
                if energy_gain(lambda pair, t=theirs: t[id(pair)], lambda pair, o=ours: o[id(pair)], held)[0] > 0:
                    best = now
                    for keep, p in zip(kept, parameters, strict=True):
                        keep.copy_(p.detach())
        with torch.no_grad():
            for keep, p in zip(kept, parameters, strict=True):
                p.grad = None
                p.copy_(keep)


def _drawn(weights: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return torch.multinomial(weights.double().cpu(), size, replacement=True, generator=generator)
