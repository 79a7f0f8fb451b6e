"""Vectors of potentials: NumPy arrays on a CPU, tensors elsewhere; which of them is decided here alone.

An operation on a short vector costs NumPy a quarter of what it costs torch, and a product with a vector up to a third,
where torch's MKL does not know the processor. Both take the same arithmetic.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_gap.monge.ot.limits import LIMITS

__all__ = ["Vector", "as_tensor", "as_vector", "in_format_of", "numerics"]

# A NumPy array on a CPU, a tensor elsewhere.
Vector = Any


def as_vector(tensor: Tensor) -> Vector:
    """Return a tensor as what this device computes vectors with, sharing memory."""
    return tensor.detach().numpy() if tensor.device.type in LIMITS.numpy else tensor


def as_tensor(vector: Vector) -> Tensor:
    """Return a vector as a tensor, sharing memory."""
    return torch.from_numpy(vector) if isinstance(vector, np.ndarray) else vector


def numerics(vector: Vector) -> Any:
    """Return the module whose functions take a vector."""
    return np if isinstance(vector, np.ndarray) else torch


def in_format_of(vector: Vector, like: Vector) -> Vector:
    """Return a vector in the dtype of another."""
    return vector.to(like.dtype) if isinstance(vector, Tensor) else vector.astype(like.dtype)
