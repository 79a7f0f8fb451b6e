"""Samples of a source, a map, the true map and a target, with weights, some of which are 0."""

import torch

GENERATOR = torch.Generator().manual_seed(3)
N, M, D = 60, 45, 3


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


X = normal(N, D)
T = 2 * X + 0.1 * normal(N, D)
TRUE = 2 * X
Y = 2 * normal(M, D) + 0.5
AGAIN = 2 * normal(N, D) + 0.5
A = torch.rand(N, generator=GENERATOR)
A[::7] = 0
A = A / A.sum()
B = torch.rand(M, generator=GENERATOR)
B = B / B.sum()
