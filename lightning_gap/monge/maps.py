"""Networks that map samples to samples."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

__all__ = ["ResidualMLP"]


class ResidualMLP(nn.Module):
    r"""A multi-layer perceptron that learns the displacement, :math:`T(x) = x + \mathrm{net}(x)`.

    The last layer starts at zero, so that the map starts at the identity, whose Monge gap is minimal.

    Args:
        dim: Dimension :math:`d` of the samples.
        hidden: Widths of the hidden layers.
        activation: Makes the activation between layers.

    Raises:
        TypeError: ``hidden`` is no sequence.
        ValueError: A width is not a positive integer.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 2)
        >>> torch.equal(ResidualMLP(2)(x), x)
        True
    """

    def __init__(
        self, dim: int, hidden: Sequence[int] = (128, 128, 128), activation: Callable[[], nn.Module] = nn.GELU
    ) -> None:
        super().__init__()
        if not isinstance(hidden, Sequence):
            raise TypeError(f"hidden must be a sequence of widths, got {hidden!r}: write hidden=(128, 128)")
        for width in (dim, *hidden):
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ValueError(f"dim and hidden must be positive integers, got {width!r}")
        layers: list[nn.Module] = []
        for n_in, n_out in zip((dim, *hidden[:-1]), hidden, strict=True) if hidden else ():
            layer = nn.Linear(n_in, n_out)
            # LeCun's normal initialization keeps the scale of the activations; torch's default shrinks them.
            nn.init.normal_(layer.weight, std=n_in**-0.5)
            nn.init.zeros_(layer.bias)
            layers += [layer, activation()]
        last = nn.Linear(hidden[-1] if hidden else dim, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.dim = dim
        self.displacement = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, d)`` samples to ``(n, d)`` samples."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"the samples have dimension {x.shape[-1]}, but the map was made with dim={self.dim}")
        displacement: Tensor = self.displacement(x)
        return x + displacement
