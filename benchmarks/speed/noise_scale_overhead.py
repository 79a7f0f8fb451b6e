"""What norms of single examples' gradients, or of ghosts', add to an update that is measured.

Updates with and without them take turns, in seconds of one processor: forward, backward, the norms, SGD. The share is
that of a run in which every tenth update is measured.

    python -m benchmarks.speed.noise_scale_overhead [--turns 15] [--models mlp cnn ...]
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measurements import Row, add_json, spread, write_rows
from lightning_gap.ghost import convert_ghost_batchnorm, ghost_slices
from lightning_gap.regime import ExampleGradients, NoiseScaleEstimate

EVERY = 10
MAX_EXAMPLES = 16  # the callback's default
GHOST = 16


class Block(nn.Module):
    """Causal attention by linear layers, and two of them more."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Add attention, then the rest."""
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


def mlp() -> nn.Module:
    """784-5x512-10."""
    widths = [784, *[512] * 5]
    layers = [layer for m, n in pairwise(widths) for layer in (nn.Linear(m, n), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def cnn(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Four 3 x 3 convolutions of 32 x 32 images, and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), norm(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 10))


def transformer() -> nn.Module:
    """Four blocks of 128 with layer norm, over 64 characters."""
    blocks = [Block(128, 4) for _ in range(4)]
    return nn.Sequential(nn.Embedding(65, 128), *blocks, nn.LayerNorm(128), nn.Linear(128, 65))


Made = tuple[nn.Module, Tensor, Tensor, list[slice] | None]


def _images(net: nn.Module, groups: list[slice] | None = None) -> Made:
    return net, torch.randn(64, 3, 32, 32), torch.randint(10, (64,)), groups


def _characters() -> Made:
    text = torch.randint(65, (32, 65))
    return transformer(), text[:, :-1], text[:, 1:], None


def _ghosts() -> Made:
    net = cnn(nn.BatchNorm2d)
    convert_ghost_batchnorm(net, GHOST)
    return _images(net, ghost_slices(64, GHOST))


MODELS: dict[str, tuple[str, Callable[[], Made]]] = {
    "mlp": ("MLP 784-5x512-10, batch 128", lambda: (mlp(), torch.randn(128, 784), torch.randint(10, (128,)), None)),
    "cnn": ("CNN with group norm, batch 64", lambda: _images(cnn(lambda width: nn.GroupNorm(8, width)))),
    "ghosts": (f"CNN with ghosts of {GHOST}, batch 64", _ghosts),
    "transformer": ("transformer 4 x 128, 32 x 64 characters", _characters),
}


def update(net: nn.Module, optimizer: Any, x: Tensor, y: Tensor, measured: Callable[[], None] | None) -> None:
    """One update, with what is to be measured before its step."""
    optimizer.zero_grad()
    output = net(x)
    F.cross_entropy(output.flatten(0, -2), y.flatten()).backward()
    if measured is not None:
        measured()
    optimizer.step()


def beside(name: str, turns: int, max_examples: int | None) -> Row:
    """Return the times of updates with and without, of pairs."""
    title, make = MODELS[name]
    torch.manual_seed(0)
    net, x, y, groups = make()
    nets = [net, copy.deepcopy(net)]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01, momentum=0.9) for each in nets]
    gradients, estimate = ExampleGradients(), NoiseScaleEstimate(decay=0.95)
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 2):
        for with_, each in enumerate(seconds):
            start = time.thread_time()
            if with_:
                gradients.listen(nets[1], examples=len(x), groups=groups, max_examples=max_examples, seed=turn)
            update(nets[with_], optimizers[with_], x, y, _measure(gradients, estimate) if with_ else None)
            if turn >= 2:  # what is compared and allocated once
                each.append(time.thread_time() - start)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other), f"{title}: training is not the same bit for bit"
    assert not gradients.unmeasured, gradients.unmeasured
    pairs = list(zip(*seconds, strict=True))
    return {
        "table": f"One update measured in {EVERY}",
        "model": title,
        "examples": "all" if max_examples is None else f"{max_examples}",
        "update, ms": spread(seconds[0], 1e3),
        "measured update, ms": spread(seconds[1], 1e3),
        "share of a run, %": spread([100 * (b - a) / a / EVERY for a, b in pairs]),
    }


def _measure(gradients: ExampleGradients, estimate: NoiseScaleEstimate) -> Callable[[], None]:
    return lambda: estimate.update(*gradients.moments())


def measure(names: Sequence[str], turns: int) -> list[Row]:
    """Print and return a row for each model."""
    rows: list[Row] = []
    print(f"{'':44}{'examples':>10}{'update, ms':>12}{'measured':>12}{f'1 in {EVERY}, %':>12}")
    for name in names:
        for max_examples in (MAX_EXAMPLES, None):
            row = beside(name, turns, max_examples)
            medians = [row[column]["median"] for column in ("update, ms", "measured update, ms", "share of a run, %")]
            numbers = "".join(f"{median:12.2f}" for median in medians)
            print(f"{row['model']:44}{row['examples']:>10}{numbers}", flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add_json(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the time of others is not seen
    write_rows(options.json, measure(options.models, options.turns))


if __name__ == "__main__":
    main()
