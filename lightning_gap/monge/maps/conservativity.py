"""How far a vector field is from being a gradient."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_gap.checks import check_integer

__all__ = ["conservativity"]


def conservativity(
    field: nn.Module,
    x: Tensor,
    condition: Tensor | None = None,
    *,
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return how far a vector field is from the gradient of a potential, 0 where its Jacobian is symmetric.

    .. math::
        C(F) = \frac1n \sum_i \|J_{x_i} F - J_{x_i} F^\top\|_F^2
             = \frac1n \sum_i E_v \|J_{x_i} F\, v - J_{x_i} F^\top v\|_2^2

    The expectation is over random signs v (Hutchinson's estimator, unbiased); each probe costs one forward pass with
    tangents and one backward pass, and no Jacobian is formed. It regularizes the field of a :class:`StructuredMap`
    (Uscidda and Cuturi 2023, "The Monge Gap", section 4), as it does score fields in Chao et al. 2023, "On
    Investigating the Conservative Property of Score-Based Generative Models".

    Args:
        field: The vector field: ``field(x)`` or ``field(x, condition)`` of the shape of ``x``, row by row; a layer
            that mixes rows, such as batch normalization in training, has no Jacobian of a row.
        x: ``(n, d)`` samples.
        condition: ``(n,)`` labels or ``(n, p)`` vectors, for a conditional field.
        probes: Number of random signs for each sample.
        generator: Source of the signs; torch's own by default.

    Returns:
        A scalar, differentiable in the parameters of the field (not in ``x``).

    Raises:
        TypeError: ``probes`` is no integer.
        ValueError: ``x`` has no row, the field changes the shape, or ``probes`` is not positive.

    Example:
        >>> import torch
        >>> turn = torch.nn.Linear(2, 2)
        >>> _ = turn.weight.data.copy_(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))  # J - Jᵀ = [[0, -2], [2, 0]]
        >>> conservativity(turn, torch.randn(5, 2)).item()
        8.0
    """
    check_integer("probes", probes)
    if x.dim() < 2 or not x.numel():
        raise ValueError(f"x must hold at least one sample, of shape (n, d), got {tuple(x.shape)}")
    wanted = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        arguments = () if condition is None else (condition.clone() if condition.is_inference() else condition,)
        points = (x.clone() if x.is_inference() else x).detach().requires_grad_()
        values = [_asymmetry(field, points, arguments, _signs(points, generator)) for _ in range(probes)]
        value = torch.stack(values).mean()
    return value if wanted else value.detach()


def _signs(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    signs = torch.randint(0, 2, x.shape, generator=generator, device=device)
    return (2 * signs - 1).to(x)


def _asymmetry(field: nn.Module, x: Tensor, arguments: tuple[Tensor, ...], v: Tensor) -> Tensor:
    # One pass gives values and tangents, so that both products belong to the same Jacobian, dropout included.
    with forward_ad.dual_level():
        out = field(forward_ad.make_dual(x, v), *arguments)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"the field returned {got} for samples of shape {tuple(x.shape)}: it must keep the shape")
        values, forward = forward_ad.unpack_dual(out)
    if not values.requires_grad:
        return x.new_zeros(())
    (backward,) = torch.autograd.grad(
        values, x, v.to(values.dtype), create_graph=True, allow_unused=True, materialize_grads=True
    )
    difference = (-backward if forward is None else forward - backward).flatten(end_dim=-2)
    difference = difference.float() if difference.dtype in (torch.float16, torch.bfloat16) else difference
    return difference.square().sum(-1).mean()
