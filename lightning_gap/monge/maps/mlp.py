"""A plain perceptron as a map."""

from collections.abc import Sequence

from torch import Tensor

from lightning_gap.monge.maps.base import TransportMap
from lightning_gap.monge.maps.perceptron import Activation, activation_factory, perceptron

__all__ = ["MLP"]


class MLP(TransportMap):
    r"""A plain multi-layer perceptron, :math:`T(x) = \mathrm{net}(x)`.

    It starts far from the identity: prefer :class:`ResidualMLP` unless source and target have nothing in common.

    Args:
        dim: Dimension :math:`d` of the samples.
        hidden: Widths of the hidden layers.
        activation: Name of the activation between layers (``"gelu"``, ``"silu"``, ``"relu"``, ...), a class of
            ``torch.nn``, or a function that makes a module.

    Raises:
        TypeError: ``hidden`` is no sequence, a number no integer, or ``activation`` makes nothing.
        ValueError: A width is not positive, or the activation's name is not known.

    Example:
        >>> import torch
        >>> MLP(2, (16,))(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (128, 128, 128), activation: Activation = "gelu") -> None:
        super().__init__(dim, hidden, activation)
        self.network = perceptron(dim, hidden, dim, activation_factory(activation)[0], zero=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, d)`` samples to ``(n, d)`` samples."""
        image: Tensor = self.network(*self.inputs(x, None))
        return image.to(x.dtype)
