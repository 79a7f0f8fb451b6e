"""The tutorial's network with Flax's first weights, for rows that differ from OTT-JAX's in nothing else.

tutorial.yaml's ``ResidualMLP`` has PyTorch's first weights, and a last layer of zeros.
"""

from collections.abc import Sequence

from torch import nn

from lightning_gap.monge import ResidualMLP

__all__ = ["FlaxStart"]


class FlaxStart(ResidualMLP):
    """A ``ResidualMLP`` that does not start at the identity: LeCun's normal distribution everywhere, biases of zero.

    Args:
        dim: Dimension of the samples.
        hidden: Widths of the hidden layers.
        activation: Name of the activation.
    """

    def __init__(self, dim: int, hidden: Sequence[int], activation: str = "gelu") -> None:
        super().__init__(dim, hidden, activation)
        for layer in self.displacement.modules():
            if isinstance(layer, nn.Linear):
                # Cut at two standard deviations and widened by what the cut takes, to a variance of 1 / inputs.
                std = layer.in_features**-0.5 / 0.87962566103423978
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(layer.bias)
