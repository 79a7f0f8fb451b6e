"""What each map costs: forward pass, and forward and backward pass, against a residual network of the same widths.

    python -m benchmarks.speed.map_cost [--dim 32] [--batch 512] [--repeats 40]

All maps have three hidden layers of width 128. Calls are timed in turns, in processor time of one thread; a ratio is
that of the fastest calls. "+ conservativity" adds one probe of the field's regularizer to the training pass.
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.measurements import Row, add_json, ratios, spread, write_rows
from lightning_gap.monge import MLP, ConditionalMap, ResidualMLP, SphereMap, StructuredMap, conservativity


def training_pass(net: nn.Module, inputs: tuple[Tensor, ...], regularized: bool) -> None:
    """Go forward and backward."""
    loss = net(*inputs).square().mean()
    if regularized:
        loss = loss + conservativity(net.field, *inputs)
    loss.backward()


def main() -> None:
    """Time all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=40)
    add_json(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    d, n = arguments.dim, arguments.batch
    maps = {
        "ResidualMLP": ResidualMLP(d),
        "MLP": MLP(d),
        'ResidualMLP, start="gaussian"': ResidualMLP(d, start="gaussian"),
        "StructuredMap, sqeuclidean": StructuredMap(d),
        "StructuredMap, pnorm(p=1.5)": StructuredMap(d, "pnorm(p=1.5)"),
        "StructuredMap, elastic": StructuredMap(d, "elastic(lam=1)"),
        "StructuredMap, sqeuclidean + conservativity": StructuredMap(d),
        "StructuredMap, sqeuclidean, potential": StructuredMap(d, potential=True),
        "StructuredMap, sqeuclidean, potential, softplus": StructuredMap(d, activation="softplus", potential=True),
        "SphereMap": SphereMap(d),
        "ConditionalMap, labels": ConditionalMap(d, num_conditions=10),
        "ConditionalMap, vectors": ConditionalMap(d, condition_dim=10),
    }
    x = torch.nn.functional.normalize(torch.randn(n, d), dim=-1)
    conditions = {"labels": torch.randint(0, 10, (n,)), "vectors": torch.randn(n, 10)}
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, net in maps.items():
        inputs = (x, conditions[name.split()[-1]]) if net.conditional else (x,)
        calls[name, "training"] = lambda net=net, inputs=inputs, name=name: training_pass(
            net, inputs, "conservativity" in name
        )
        if "conservativity" not in name:
            calls[name, "forward"] = lambda net=net, inputs=inputs: net(*inputs)
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(arguments.repeats):
        for key, call in calls.items():
            start = time.process_time()
            with torch.set_grad_enabled(key[1] == "training"):
                call()
            spent[key].append(time.process_time() - start)
    best = {key: min(times) for key, times in spent.items()}
    rows: list[Row] = []
    table = Table("map", "forward, ms", "ratio", "training, ms", "ratio")
    for name in maps:
        row = []
        for kind in ("forward", "training"):
            seconds = best.get((name, kind))
            row += ["", ""] if seconds is None else [
                f"{1000 * seconds:.2f}", f"{seconds / best['ResidualMLP', kind]:.2f}"
            ]  # fmt: skip
        table.add_row(name, *row)
        found: dict[str, object] = {"map": name}
        for kind in ("forward", "training"):
            times, base = spent.get((name, kind)), spent["ResidualMLP", kind]
            if times:
                found |= {f"{kind}, ms": spread(times, 1e3), f"{kind}, ratio": ratios(times, base)}
            else:
                found |= {f"{kind}, ms": "", f"{kind}, ratio": ""}
        rows.append(found)
    Console(width=120).print(table)
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
