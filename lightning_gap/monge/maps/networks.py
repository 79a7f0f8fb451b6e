"""The network inside a map: a perceptron, one with conditions, or the gradient of a potential."""

from collections.abc import Sequence

from torch import nn

from lightning_gap.monge.maps.conditioning import ConditionalPerceptron, Conditioning
from lightning_gap.monge.maps.perceptron import Activation, activation_factory, check_widths, perceptron
from lightning_gap.monge.maps.potential import PotentialGradient

__all__ = ["network"]


def network(
    dim: int,
    hidden: Sequence[int],
    activation: Activation,
    *,
    potential: bool = False,
    num_conditions: int | None = None,
    condition_dim: int | None = None,
    embedding_dim: int = 32,
) -> nn.Module:
    """Return a network from samples, and perhaps conditions, to vectors, which starts at zero."""
    widths = check_widths(dim, hidden)
    factory, name = activation_factory(activation)
    conditioning = None
    if num_conditions is not None or condition_dim is not None:
        conditioning = Conditioning(
            widths, dim, num_conditions=num_conditions, condition_dim=condition_dim, embedding_dim=embedding_dim
        )
    if potential:
        return PotentialGradient(dim, widths, name, conditioning)
    if conditioning is not None:
        return ConditionalPerceptron(dim, widths, factory, conditioning)
    return perceptron(dim, widths, dim, factory, zero=True)
