"""The gradient of a scalar network, written out layer by layer."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gap.monge.maps.conditioning import Conditioning
from lightning_gap.monge.maps.perceptron import linear

__all__ = ["PotentialGradient"]


def _gelu_slope(u: Tensor) -> Tensor:
    return (1 + torch.erf(u * math.sqrt(0.5))) / 2 + u * torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)


def _silu_slope(u: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    return s * (1 + u * (1 - s))


def _tanh_slope(u: Tensor) -> Tensor:
    return 1 - torch.tanh(u).square()


# Activations that are differentiable twice, without which a potential's gradient cannot learn: function and slope.
_SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, _gelu_slope),
    "silu": (F.silu, _silu_slope),
    "softplus": (F.softplus, torch.sigmoid),
    "tanh": (torch.tanh, _tanh_slope),
}


class PotentialGradient(nn.Module):
    """The gradient of a scalar perceptron, which starts at zero, written out as a forward pass.

    So it works without gradients, in inference mode, compiled and exported, and can be differentiated like any network.
    """

    def __init__(
        self, dim: int, hidden: Sequence[int], activation: str | None, conditioning: Conditioning | None = None
    ) -> None:
        super().__init__()
        if activation not in _SMOOTH:
            raise ValueError(
                "the gradient of a potential needs a smooth activation of known slope: choose one of "
                f"{', '.join(_SMOOTH)}, got {activation or 'one of your own'}"
            )
        if not hidden:
            raise ValueError("a potential needs at least one hidden layer, got hidden=(): write hidden=(128, 128)")
        self.activation = activation
        self.layers = nn.ModuleList(linear(*sizes) for sizes in zip((dim, *hidden[:-1]), hidden, strict=True))
        # The potential's own constant has no gradient.
        self.last = nn.Parameter(torch.zeros(hidden[-1]))
        self.conditioning = conditioning

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return ``(..., d)`` gradients at ``(..., d)`` samples."""
        function, slope_of = _SMOOTH[self.activation]
        films, shift = (None, None) if self.conditioning is None else self.conditioning(condition)
        slopes = []
        for index, layer in enumerate(self.layers):
            u = layer(x)
            if films is not None:
                u = films[index][0] * u + films[index][1]
            slope = slope_of(u)
            slopes.append(slope if films is None else slope * films[index][0])
            # The last layer's value is not needed: its slope is.
            x = function(u) if index + 1 < len(self.layers) else u
        gradient = self.last.expand_as(x)
        for layer, slope in zip(reversed(self.layers), reversed(slopes), strict=True):
            gradient = F.linear(gradient * slope, layer.weight.mT)  # type: ignore[arg-type]
        return gradient if shift is None else gradient + shift
