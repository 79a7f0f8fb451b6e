"""What gradients hold, however they are laid out."""

import torch
from torch import Tensor

__all__ = ["gradient_values"]


def gradient_values(gradient: Tensor) -> Tensor:
    """Return the numbers of a gradient, each element once: of a sparse one those that it holds, the others being zero.

    Sparse ones, as of ``nn.Embedding(sparse=True)``, may name a row twice; the gradient itself is left as it is.
    """
    if gradient.layout is torch.strided:
        return gradient
    return (gradient.coalesce() if gradient.layout is torch.sparse_coo else gradient).values()
