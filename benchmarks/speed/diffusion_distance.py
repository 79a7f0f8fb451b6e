"""What one measurement of ‖w_t − w_0‖ costs beside reading both copies once, and how exact it is.

    python -m benchmarks.speed.diffusion_distance [--threads 1] [--repeats 40]

The weights of ResNet-18 (11.7 million, float32), and the same count of weights in bfloat16. Each round times all ways
one after the other; the table has the medians over the rounds of times and of ratios to the reading in the same round.
"Read both once" is ``sum()`` of each tensor. "error" is relative to a float64 computation; "equal moves" is the error
where every weight has moved by the same amount, as after Adam's first step, so that all roundings go one way.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.measurements import Row, add_json, ratios, spread, write_rows
from lightning_gap.diffusion import weight_displacement, weight_norm

# ResNet-18 with 1000 classes: its convolutions, BatchNorm vectors and the last layer.
CHANNELS = [(64, 64, 4), (64, 128, 1), (128, 128, 3), (128, 256, 1), (256, 256, 3), (256, 512, 1), (512, 512, 3)]
SHAPES = [(64, 3, 7, 7), (128, 64, 1, 1), (256, 128, 1, 1), (512, 256, 1, 1), (1000, 512), (1000,)]
SHAPES += [(out, into, 3, 3) for into, out, count in CHANNELS for _ in range(count)]
SHAPES += [(width,) for width in (64, 128, 256, 512) for _ in range(10)]

Weights = dict[str, Tensor]


def current(weights: Weights, anchor: Weights, norm: float) -> float:
    return weight_displacement(weights, anchor, anchor_norm=norm).distance


def foreach(weights: Weights, anchor: Weights, norm: float) -> float:
    norms = torch._foreach_norm(torch._foreach_sub(list(weights.values()), list(anchor.values())))
    torch._foreach_norm(list(weights.values()))  # ‖w_t‖, which the others give too
    return torch.stack(norms).norm().item()


def vectors(weights: Weights, anchor: Weights, norm: float) -> float:
    now, start = (torch.nn.utils.parameters_to_vector(list(side.values())) for side in (weights, anchor))
    now.norm().item()
    return (now - start).norm().item()


def exact(weights: Weights, anchor: Weights) -> float:
    return sum((weights[n].double() - anchor[n].double()).square().sum() for n in anchor).sqrt().item()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table(dtype: torch.dtype, repeats: int) -> list[Row]:
    anchor = {str(i): torch.randn(shape).to(dtype) for i, shape in enumerate(SHAPES)}
    weights = {name: (a.float() + 0.01 * torch.randn(a.shape)).to(dtype) for name, a in anchor.items()}
    zero = {name: torch.zeros_like(a) for name, a in anchor.items()}
    equal = {name: torch.full_like(a, 1e-3) for name, a in anchor.items()}
    norm = weight_norm(anchor)
    ways = {"weight_displacement": current, "foreach": foreach, "parameters_to_vector": vectors}
    reading = [seconds(lambda: [(weights[n].sum(), anchor[n].sum()) for n in anchor])]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        reading.append(seconds(lambda: [(weights[n].sum(), anchor[n].sum()) for n in anchor]))
        for name, way in ways.items():
            times[name].append(seconds(lambda way=way: way(weights, anchor, norm)))
    del reading[0]
    size = sum(a.nbytes for a in anchor.values())
    bandwidths = f"{2e-9 * size / median(reading):.1f} GB/s, at best {2e-9 * size / min(reading):.1f}"
    print(f"{dtype}: {size / 1e6:.0f} MB a copy, both read once in {1e3 * median(reading):.2f} ms ({bandwidths})")
    print(f"{'':24}{'ms':>8}{'x read':>8}{'best':>8}{'error':>10}{'equal moves':>14}")
    where = {"weights": str(dtype).removeprefix("torch.")}
    rows: list[Row] = [{**where, "way": "read both once", "ms": spread(reading, 1e3), "× reading": 1.0, "error": ""}]
    for name, way in ways.items():
        ratio = median(t / r for t, r in zip(times[name], reading, strict=True))
        errors = [abs(way(w, a, norm) / exact(w, a) - 1) for w, a in ((weights, anchor), (equal, zero))]
        best = min(times[name]) / min(reading)
        print(f"{name:24}{1e3 * median(times[name]):8.2f}{ratio:8.2f}{best:8.2f}{errors[0]:10.0e}{errors[1]:14.0e}")
        timed = {"ms": spread(times[name], 1e3), "× reading": ratios(times[name], reading)}
        rows.append({**where, "way": name, **timed, "error": errors[0]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    add_json(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in table(dtype, options.repeats)]
    write_rows(options.json, rows)


if __name__ == "__main__":
    main()
