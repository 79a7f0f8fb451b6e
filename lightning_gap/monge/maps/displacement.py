"""Points on the way from samples to their images."""

import math

import torch
from torch import Tensor
from torch.linalg import vector_norm

__all__ = ["displaced"]


def displaced(x: Tensor, image: Tensor, t: float, *, on_sphere: bool = False) -> Tensor:
    r"""Return the points at a time from 0 to 1 on the shortest ways from samples to their images.

    .. math::
        x_t = (1 - t)\, x + t\, y, \qquad
        x_t = \frac{\sin((1 - t)\theta)}{\sin \theta}\, x + \frac{\sin(t\theta)}{\sin \theta}\, y
        \quad \text{on the sphere}

    with :math:`\theta` the angle between x and y (McCann 1997, "A convexity principle for interacting gases"; Shoemake
    1985, "Animating rotation with quaternion curves"). Between antipodal points all ways are equally long: one of them
    is taken.

    Args:
        x: ``(n, d)`` samples.
        image: ``(n, d)`` images.
        t: The time.
        on_sphere: Whether the way is a great circle of the unit sphere.

    Example:
        >>> import torch
        >>> east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> displaced(east, north, 0.5), displaced(east, north, 0.5, on_sphere=True)
        (tensor([[0.5000, 0.5000]]), tensor([[0.7071, 0.7071]]))
    """
    if not on_sphere:
        return torch.lerp(x, image, t)
    chord, opposite = vector_norm(x - image, dim=-1, keepdim=True), vector_norm(x + image, dim=-1, keepdim=True)
    angle = 2 * torch.atan2(chord, opposite)
    eps = torch.finfo(x.dtype).eps
    # Where the points nearly coincide the weights are those of the chord, but for the square of the angle.
    near, antipodal = angle.detach() < eps**0.5, opposite.detach() < 8 * eps
    regular = torch.where(near | antipodal, 1, angle)
    weights = [torch.where(near, share, (share * regular).sin() / regular.sin()) for share in (1 - t, t)]
    point = weights[0] * x + weights[1] * image
    axis = torch.nn.functional.one_hot(x.detach().abs().argmin(-1), x.shape[-1]).to(x)
    across = torch.nn.functional.normalize(axis - (axis * x).sum(-1, keepdim=True) * x, dim=-1)
    point = torch.where(antipodal, math.cos(t * math.pi) * x + math.sin(t * math.pi) * across, point)
    way: Tensor = point / vector_norm(point, dim=-1, keepdim=True)
    return way
