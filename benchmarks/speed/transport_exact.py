"""Exact transport: beside SciPy's assignment and POT's network simplex where their matrix fits, and beyond by itself.

    python -m benchmarks.speed.transport_exact [--sizes 1000 2000] [--alone 10000 20000] [--dims 2 10]

``trained``: images of a nearly optimal map; ``reversed``: of x ↦ −x; ``independent``: other samples, as many; and
``weighted``: four fifths as many, both with weights, which only POT takes. Peers get the matrix, whose filling counts
for them, too. "Gap" is what the plan costs beyond its bound, as a share of the cost; "error" is ours beside the peer's.
"""

import argparse
import time
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.measurements import Row, add_json, ratios, spread, write_rows
from lightning_gap.monge.ot.costs import resolve
from lightning_gap.monge.ot.solve import optimal_transport

KINDS = ("trained", "reversed", "independent", "weighted")
Samples = tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]


def samples(kind: str, n: int, d: int) -> Samples:
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(n, d, dtype=torch.float64, generator=generator) for _ in range(2))
    if kind == "trained":
        return x, 1.5 * x + 0.3 + 0.05 * other, (None, None)
    if kind == "reversed":
        return x, -x, (None, None)
    if kind == "independent":
        return x, 1.2 * other + 0.5, (None, None)
    a, b = (torch.rand(k, dtype=torch.float64, generator=generator) + 0.1 for k in (n, 4 * n // 5))
    return x, 1.2 * other[: len(b)] + 0.5, (a / a.sum(), b / b.sum())


def peer(cost: str, given: Samples) -> float:
    x, y, (a, b) = given
    C = resolve(cost).pairwise(x, y).numpy()
    if a is None or b is None:
        return float(C[linear_sum_assignment(C)].mean())
    import ot

    return float(ot.emd2(a.numpy(), b.numpy(), C, numItermax=10_000_000))


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def beside(cost: str, kind: str, n: int, d: int, repeats: int) -> Row:
    given = samples(kind, n, d)
    x, y, weights = given
    ours, theirs, value, right = [], [], 0.0, 0.0
    # Compiles, and imports POT.
    optimal_transport(x[:800], y[:800], cost=cost, solver="exact")
    peer(cost, samples("weighted", 50, d))
    for _ in range(repeats):
        seconds, found = timed(lambda: optimal_transport(x, y, cost=cost, weights=weights, solver="exact").value)
        ours.append(seconds)
        value = float(found)  # type: ignore[arg-type]
        seconds, found = timed(lambda: peer(cost, given))
        theirs.append(seconds)
        right = float(found)  # type: ignore[arg-type]
    name = "POT" if kind == "weighted" else "SciPy"
    times = {"ours, s": spread(ours), "peer": name, "peer, s": spread(theirs), "peer / ours": ratios(theirs, ours)}
    return {
        "table": "Beside a peer",
        "cost": cost,
        "samples": kind,
        "n": n,
        "d": d,
        **times,
        "error": value / right - 1,
    }


def alone(cost: str, kind: str, n: int, d: int) -> Row:
    x, y, weights = samples(kind, n, d)
    seconds, result = timed(lambda: optimal_transport(x, y, cost=cost, weights=weights, solver="exact"))
    gap, value = result.duality_gap, float(result.value)  # type: ignore[attr-defined]
    told = "" if gap is None else gap / value
    return {"table": "Alone", "cost": cost, "samples": kind, "n": n, "d": d, "seconds": spread([seconds]), "gap": told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1000, 2000])
    parser.add_argument("--alone", type=int, nargs="*", default=[10_000])
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--costs", nargs="+", default=["sqeuclidean"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--repeats", type=int, default=1)
    add_json(parser)
    options = parser.parse_args()
    rows: list[Row] = []
    every = [(cost, d, kind) for cost in options.costs for d in options.dims for kind in options.kinds]
    for n in options.sizes:
        for cost, d, kind in every:
            rows.append(beside(cost, kind, n, d, options.repeats))
            print(rows[-1], flush=True)
    for n in options.alone:
        for cost, d, kind in every:
            if kind != "weighted":
                rows.append(alone(cost, kind, n, d))
                print(rows[-1], flush=True)
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
