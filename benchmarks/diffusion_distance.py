"""What one measurement of ‖w_t − w_0‖ costs beside reading both copies once, and how exact it is.

Run: python benchmarks/diffusion_distance.py
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_gap.diffusion import weight_displacement, weight_norm

# Shapes of ResNet-18's larger convolutions, 11 million weights in all.
SHAPES = [(64, 64, 3, 3)] * 4 + [(128, 128, 3, 3)] * 4 + [(256, 256, 3, 3)] * 4 + [(512, 512, 3, 3)] * 3 + [(512,)] * 20


def best_ms(function: Callable[[], object], repeats: int = 15) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def foreach_distance(weights: dict[str, Tensor], anchor: dict[str, Tensor]) -> float:
    norms = torch._foreach_norm(torch._foreach_sub(list(weights.values()), list(anchor.values())))
    return torch.stack(norms).norm().item()


def vector_distance(weights: dict[str, Tensor], anchor: dict[str, Tensor]) -> float:
    vectors = [torch.nn.utils.parameters_to_vector(list(side.values())) for side in (weights, anchor)]
    return (vectors[0] - vectors[1]).norm().item()


def main() -> None:
    torch.manual_seed(0)
    anchor = {str(i): torch.randn(shape) for i, shape in enumerate(SHAPES)}
    weights = {name: a + 0.01 * torch.randn_like(a) for name, a in anchor.items()}
    norm = weight_norm(anchor)
    exact = sum((weights[n].double() - anchor[n].double()).square().sum() for n in anchor).sqrt().item()
    read = best_ms(lambda: [(weights[n].sum(), anchor[n].sum()) for n in anchor])
    size = sum(a.numel() for a in anchor.values())
    bandwidth = 8 * size / read / 1e6
    print(f"{size / 1e6:.1f} M float32 weights, {torch.get_num_threads()} threads")
    print(f"both copies read once (sum) in {read:.1f} ms, {bandwidth:.1f} GB/s")
    print(f"{'':24}{'ms':>8}{'x read':>8}{'error':>10}")
    for name, function in {
        "weight_displacement": lambda: weight_displacement(weights, anchor, anchor_norm=norm).distance,
        "foreach, float32": lambda: foreach_distance(weights, anchor),
        "parameters_to_vector": lambda: vector_distance(weights, anchor),
    }.items():
        ms = best_ms(function)
        print(f"{name:24}{ms:8.1f}{ms / read:8.1f}{abs(function() / exact - 1):10.0e}")


if __name__ == "__main__":
    main()
