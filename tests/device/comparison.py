"""The same computation on the CPU and on a device."""

from collections.abc import Callable

import torch
from torch import Tensor


def values_and_gradients(function: Callable[..., Tensor], *inputs: Tensor, device: str) -> list[Tensor]:
    """Return the value and the gradients by the inputs, computed on a device, on the CPU.

    Args:
        function: Of tensors; its values are summed for the gradients.
        inputs: CPU tensors.
        device: Where to compute.
    """
    leaves = [t.detach().to(device).requires_grad_(t.is_floating_point()) for t in inputs]
    value = function(*leaves)
    assert value.device.type == torch.device(device).type
    gradients: list[Tensor] = []
    if value.requires_grad:
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad(value.float().sum(), wanted, allow_unused=True)
        gradients = [gradient.cpu() for gradient in found if gradient is not None]
    return [value.detach().cpu(), *gradients]


def near(found: Tensor, expected: Tensor, share: float) -> None:
    """Assert that the difference is at most a share of what is expected, in the Euclidean norm."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    difference, size = (found - expected).double().norm(), expected.double().norm()
    assert difference <= share * size + 1e-12, f"{float(difference):.3g} apart, of {float(size):.3g}"


def same_on_cpu(function: Callable[..., Tensor], *inputs: Tensor, device: str, share: float = 1e-4) -> None:
    """Assert that value and gradients on a device are those on the CPU, but for a share of their norms."""
    expected = values_and_gradients(function, *inputs, device="cpu")
    for found, wanted in zip(values_and_gradients(function, *inputs, device=device), expected, strict=True):
        near(found, wanted, share)
