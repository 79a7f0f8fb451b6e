"""The slow, obvious twin: the ghosts of a batch go through torch's own BatchNorm one after another."""

import torch
from torch import Tensor, nn

from lightning_gap.ranks.group import RankGroup

PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SPATIAL = {2: (), 3: (5,), 4: (3, 4), 5: (2, 3, 2)}
G = 4


def make(dim, channels=3, **kwargs):
    """A plain layer in double precision, its scale and shift drawn."""
    layer = PLAIN[dim](channels, dtype=torch.float64, **kwargs)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


def randn(n, dim, channels=3, dtype=torch.float64):
    return torch.randn(n, channels, *SPATIAL[dim], dtype=dtype) * 3 + 2


def as_format(x, memory_format):
    if memory_format == "channels_last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if memory_format == "sliced":  # every second channel of a wider tensor
        return torch.stack((x, x + 1), 2).flatten(1, 2)[:, ::2]
    if memory_format == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


def members(n: int, g: int, grouping: str, values: int) -> list[list[int]]:
    """Which samples form each ghost, by dealing them out one at a time."""
    full = n // g
    if full == 0:
        return [list(range(n))]
    ghosts: list[list[int]] = [[] for _ in range(full)]
    for i in range(full * g):
        ghosts[i // g if grouping == "contiguous" else i % full].append(i)
    rest = list(range(full * g, n))
    if len(rest) == 1 and values == 1:
        ghosts[-1 if grouping == "contiguous" else 0] += rest
    elif rest:
        ghosts.append(rest)
    return ghosts


def one_after_another(
    layer: nn.Module, x: Tensor, g: int, *, grouping: str = "contiguous", running_stats: str = "sequential"
) -> Tensor:
    """Feed the ghosts through a plain layer in training mode; its running statistics follow."""
    ghosts = members(len(x), g, grouping, x[0, 0].numel())
    momentum, count = layer.momentum, layer.num_batches_tracked
    before = None if count is None else count.clone()
    if running_stats == "per_step" and momentum is not None:
        layer.momentum = 1 - (1 - momentum) ** (1 / len(ghosts))
    y = torch.empty_like(x)
    if running_stats == "per_step" and momentum is None:
        old = {name: getattr(layer, name) for name in ("running_mean", "running_var", "num_batches_tracked")}
        for name, buffer in old.items():  # new tensors: the backward pass of torch's kernels holds the old ones
            setattr(layer, name, torch.zeros_like(buffer))
    for ghost in ghosts:
        y[ghost] = layer(x[ghost])
    if running_stats == "per_step" and before is not None:
        layer.num_batches_tracked = before + 1
        if momentum is None:  # the buffers hold this batch's average over its ghosts: one update of the cumulative one
            for name in ("running_mean", "running_var"):
                setattr(layer, name, old[name] + (getattr(layer, name) - old[name]) / (before + 1))
    layer.momentum = momentum
    return y


class TwoRanks(RankGroup):
    """Two ranks that hold the same samples: each sum and each gradient is twice one rank's."""

    def __init__(self):
        self.group, self.size = None, 2

    def gather(self, value):
        return torch.stack([value.detach()] * 2)

    def sum(self, value):
        return 2 * value.detach()
