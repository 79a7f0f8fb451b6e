"""The floating-point formats that a device has."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["full_precision", "widest"]

# Types of devices without double precision.
_WITHOUT_DOUBLE = {"mps"}


def widest(device: torch.device | str) -> torch.dtype:
    """Return the widest floating-point dtype of a device: float64, but float32 on Apple's GPUs."""
    return torch.float32 if torch.device(device).type in _WITHOUT_DOUBLE else torch.float64


@contextmanager
def full_precision(device: torch.device | str) -> Iterator[None]:
    """Take matrix products in full float32 on a GPU, whatever ``torch.set_float32_matmul_precision`` says.

    TensorFloat-32, which Lightning advises, keeps ten bits of a factor: enough for a network, and too few for
    differences of costs.
    """
    before = torch.get_float32_matmul_precision()
    if torch.device(device).type != "cuda" or before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
