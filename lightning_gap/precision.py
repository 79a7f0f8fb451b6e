"""The floating-point formats that a device has."""

import torch

__all__ = ["widest"]

# Types of devices without double precision.
_WITHOUT_DOUBLE = {"mps"}


def widest(device: torch.device | str) -> torch.dtype:
    """Return the widest floating-point dtype of a device: float64, but float32 on Apple's GPUs.

    Args:
        device: Where it is to be used.

    Example:
        >>> widest("cpu")
        torch.float64
    """
    return torch.float32 if torch.device(device).type in _WITHOUT_DOUBLE else torch.float64
