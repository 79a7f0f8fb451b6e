"""What norms of single examples' gradients, of ghosts', or of micro-batches' in dual norms, add to a measured update.

Updates with and without them take turns, in seconds of one processor: forward, backward, the norms, SGD. The share is
that of a run in which every tenth update is measured. For dual norms an update has four micro-batches, and is AdamW's,
or Muon's for matrices and AdamW's for the rest.

    python -m benchmarks.speed.noise_scale_overhead [--turns 15] [--models mlp cnn ...] [--norms l1 nuclear]
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
from lightning_gap.regime import DualNoiseScaleEstimate, DualNormGradients, ExampleGradients, NoiseScaleEstimate
from lightning_gap.regime.dual_norms import DualNorm

EVERY = 10
MAX_EXAMPLES = 16  # the callback's default
GHOST = 16
PARTS = 4  # micro-batches of an update in dual norms
NORMS: tuple[DualNorm, ...] = ("l1", "nuclear")


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


class AdamW:
    """AdamW for all weights: the l1 norm."""

    def __init__(self, net: nn.Module) -> None:
        self.all: list[torch.optim.Optimizer] = [torch.optim.AdamW(net.parameters(), lr=1e-3)]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for each in self.all:
            each.zero_grad()

    def step(self) -> None:
        """Let every optimizer step."""
        for each in self.all:
            each.step()


class Muon(AdamW):
    """Muon for the matrices, the nuclear norm, and AdamW for the rest."""

    def __init__(self, net: nn.Module) -> None:
        matrices = [parameter for parameter in net.parameters() if parameter.dim() == 2]
        rest = [parameter for parameter in net.parameters() if parameter.dim() != 2]
        self.all = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3)]


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


def update(
    net: nn.Module, optimizer: Any, x: Tensor, y: Tensor, measured: Callable[[], None] | None, parts: int = 1
) -> None:
    """One update, with what is to be measured before its step."""
    optimizer.zero_grad()
    for inputs, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
        output = net(inputs)
        (F.cross_entropy(output.flatten(0, -2), labels.flatten()) / parts).backward()
    if measured is not None:
        measured()
    optimizer.step()


def by_examples(name: str, turns: int, max_examples: int | None) -> Row:
    """Return the times of updates with and without norms of examples, of pairs."""
    title, make = MODELS[name]
    torch.manual_seed(0)
    net, x, y, groups = make()
    gradients, estimate = ExampleGradients(), NoiseScaleEstimate(decay=0.95)

    def listen(heard: nn.Module, _: Any, turn: int) -> None:
        gradients.listen(heard, examples=len(x), groups=groups, max_examples=max_examples, seed=turn)

    times = beside(title, turns, (net, x, y), listen, lambda: estimate.update(*gradients.moments()))
    assert not gradients.unmeasured, gradients.unmeasured
    examples = "all" if max_examples is None else f"{max_examples}"
    return {"table": f"One update measured in {EVERY}", "model": title, "examples": examples, **times}


def by_norm(name: str, turns: int, norm: DualNorm) -> Row:
    """Return the times of updates of several micro-batches with and without their dual norms, of pairs."""
    title, make = MODELS[name]
    torch.manual_seed(0)
    net, x, y, _ = make()
    gradients, estimate = DualNormGradients(), DualNoiseScaleEstimate(decay=0.95, norm=norm)
    times = beside(
        title,
        turns,
        (net, x, y),
        lambda _, optimizer, turn: gradients.listen(optimizer.all, "auto"),
        lambda: estimate.update(*gradients.moments(len(x) // PARTS)),
        PARTS,
        Muon if norm == "nuclear" else AdamW,
    )
    assert estimate.measurements, "nothing was measured"
    table = f"Dual norms, {PARTS} micro-batches an update, one update measured in {EVERY}"
    return {"table": table, "model": title, "norms": "l1" if norm == "l1" else "nuclear and l1", **times}


def beside(
    title: str,
    turns: int,
    made: tuple[nn.Module, Tensor, Tensor],
    listen: Callable[[nn.Module, Any, int], None],
    measured: Callable[[], None],
    parts: int = 1,
    make_optimizer: Callable[[nn.Module], Any] = lambda net: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9),
) -> Row:
    """Return the times of updates with and without what is measured, of pairs, once both are the same bit for bit."""
    net, x, y = made
    nets = [net, copy.deepcopy(net)]
    optimizers = [make_optimizer(each) for each in nets]
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 2):
        for with_, each in enumerate(seconds):
            start = time.thread_time()
            if with_:
                listen(nets[1], optimizers[1], turn)
            update(nets[with_], optimizers[with_], x, y, measured if with_ else None, parts)
            if turn >= 2:  # what is compared and allocated once
                each.append(time.thread_time() - start)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other), f"{title}: training is not the same bit for bit"
    pairs = list(zip(*seconds, strict=True))
    return {
        "update, ms": spread(seconds[0], 1e3),
        "measured update, ms": spread(seconds[1], 1e3),
        "share of a run, %": spread([100 * (b - a) / a / EVERY for a, b in pairs]),
    }


def measure(names: Sequence[str], turns: int, norms: Sequence[DualNorm] = NORMS) -> list[Row]:
    """Print and return rows for each model."""
    print(f"{'':44}{'examples':>10}{'update, ms':>12}{'measured':>12}{f'1 in {EVERY}, %':>12}")
    rows: list[Row] = []
    for name in names:
        for max_examples in (MAX_EXAMPLES, None):
            rows.append(by_examples(name, turns, max_examples))
            _print(rows[-1], rows[-1]["examples"])
    for name in names:
        for norm in norms:
            rows.append(by_norm(name, turns, norm))
            _print(rows[-1], norm)
    return rows


def _print(row: Row, what: str) -> None:
    medians = [row[column]["median"] for column in ("update, ms", "measured update, ms", "share of a run, %")]
    print(f"{row['model']:44}{what:>10}{''.join(f'{median:12.2f}' for median in medians)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--norms", nargs="*", choices=NORMS, default=list(NORMS))
    add_json(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the time of others is not seen
    write_rows(options.json, measure(options.models, options.turns, options.norms))


if __name__ == "__main__":
    main()
