"""Maps of the unit sphere to itself."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_gap.checks import renamed
from lightning_gap.monge.maps.base import TransportMap
from lightning_gap.monge.maps.perceptron import Activation

__all__ = ["SphereMap", "circle"]

# Below this square of an angle, its cosine and cardinal sine are those of their series, whose derivatives are finite.
_SMALL = 0.01


class SphereMap(TransportMap):
    r"""A map of the unit sphere to itself, for the geodesic cost: the exponential map of a tangent vector.

    .. math::
        T(x) = \exp_x(v) = \cos(\|v\|)\, x + \frac{\sin \|v\|}{\|v\|}\, v, \qquad
        v = (I - x x^\top)\, \mathrm{net}(x)

    (McCann 2001, "Polar factorization of maps on Riemannian manifolds".) Images are normalized, so that they are on
    the sphere to the last digit. The last layer starts at zero and the map at the identity.

    Args:
        dim: Dimension :math:`d` of the space around the sphere, at least 2: 3 for the globe.
        hidden: Widths of the hidden layers.
        activation: Name of the activation between layers, a class of ``torch.nn``, or a function that makes a module.
        num_conditions: Number K of categories, for a conditional map of labels 0 to K - 1; or else
        condition_dim: Dimension p of the vectors that are conditions.
        embedding_dim: Width of the condition's embedding.
        conditions: Old name of ``num_conditions``.

    Raises:
        TypeError: ``hidden`` is no sequence, a number no integer, or ``activation`` makes nothing.
        ValueError: A number is not positive, ``dim`` is 1, or a name is not known; and when the map is
            called, a sample is off the unit sphere by more than 1e-3 (1e-2 in half precision).

    Example:
        >>> import torch
        >>> x = torch.nn.functional.normalize(torch.randn(5, 3), dim=-1)
        >>> torch.allclose(SphereMap(3)(x), x)
        True
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (128, 128, 128),
        activation: Activation = "gelu",
        *,
        num_conditions: int | None = None,
        condition_dim: int | None = None,
        embedding_dim: int = 32,
        conditions: int | None = None,
    ) -> None:
        num_conditions = renamed("conditions", "num_conditions", conditions, num_conditions)
        kinds = {"num_conditions": num_conditions, "condition_dim": condition_dim, "embedding_dim": embedding_dim}
        super().__init__(dim, hidden, activation, **kinds)
        if dim == 1:
            raise ValueError("dim must be at least 2, got 1: the sphere of R¹ is two points, which no map moves")
        self.displacement = self.made_network(hidden, activation, embedding_dim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map ``(n, d)`` unit vectors, under their conditions if the map is conditional, to ``(n, d)`` unit vectors."""
        arguments = self.inputs(x, condition)
        # Half precision has no digits for the sphere.
        point = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        norm: Tensor = vector_norm(point, dim=-1, keepdim=True)
        # A compiled or exported graph cannot look at values.
        if not torch.compiler.is_compiling():
            _check_on_sphere(norm, 1e-3 if point is x else 1e-2)
        point = point / norm
        v: Tensor = self.displacement(*arguments).to(point.dtype)
        v = v - (v * point).sum(-1, keepdim=True) * point
        cosine, cardinal_sine = circle(v.square().sum(-1, keepdim=True))
        image = cosine * point + cardinal_sine * v
        length: Tensor = vector_norm(image, dim=-1, keepdim=True)
        return (image / length).to(x.dtype)


def _check_on_sphere(norm: Tensor, tolerance: float) -> None:
    off = ((norm.detach() - 1).abs() > tolerance).flatten()
    if bool(off.any()):
        raise ValueError(
            f"x has {int(off.sum())} points off the unit sphere (first at row {int(off.nonzero()[0])}): "
            "divide the samples by their norm"
        )


def circle(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``cos θ`` and ``sin θ / θ`` of an angle's square, smoothly at 0."""
    small = square < _SMALL
    angle = torch.where(small, 1, square).sqrt()
    s = torch.where(small, square, 0)
    cosine = 1 - s / 2 * (1 - s / 12 * (1 - s / 30 * (1 - s / 56 * (1 - s / 90))))
    cardinal_sine = 1 - s / 6 * (1 - s / 20 * (1 - s / 42 * (1 - s / 72 * (1 - s / 110))))
    return torch.where(small, cosine, angle.cos()), torch.where(small, cardinal_sine, angle.sin() / angle)
