"""Costs of p-norms, and of the elastic net."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from lightning_gap.checks import check_number
from lightning_gap.monge.ot.costs.base import TranslationInvariantCost
from lightning_gap.monge.ot.costs.formula import CostFormula

__all__ = ["Elastic", "PNorm", "SqPNorm", "p_norm", "rational"]


@dataclass(frozen=True)
class PNorm(TranslationInvariantCost):
    r"""Power of a p-norm, :math:`c(x, y) = \tfrac1p \|x - y\|_p^p = \tfrac1p \sum_k |x_k - y_k|^p`.

    Args:
        p: Exponent, at least 1.

    Example:
        >>> import torch
        >>> PNorm(3.0).paired(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]))
        tensor([3.])
    """

    p: float
    name: ClassVar[str] = "pnorm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", check_number("p", self.p, least=1))

    def h(self, z: Tensor) -> Tensor:
        """Return ``Σ|z|^p / p``."""
        return z.abs().pow(self.p).sum(-1) / self.p

    def grad_h_conjugate(self, w: Tensor) -> Tensor:
        """Return ``sign(w) |w|^(q-1)`` with ``1/p + 1/q = 1``."""
        if self.p == 1:
            return super().grad_h_conjugate(w)
        return w.sign() * w.abs().pow(1 / (self.p - 1))

    def regular_point(self, w: Tensor) -> Tensor:
        """Return ``w`` with each coordinate's absolute value at least that where the slope is 0.1, or 10 if p > 2."""
        return _at_least(w, _regular_radius(1 / (self.p - 1)))

    @property
    def formula(self) -> CostFormula:
        """The sum of powers."""
        return CostFormula(*_power_and_slope(self.p), scale=1 / self.p, number=self.p)

    @property
    def keops_formula(self) -> str:
        """The sum of powers."""
        return f"({rational(1 / self.p)} * Sum({_keops_power('Abs(X-Y)', self.p)}))"


@dataclass(frozen=True)
class SqPNorm(TranslationInvariantCost):
    r"""Half a squared p-norm, :math:`c(x, y) = \tfrac12 \|x - y\|_p^2`.

    Args:
        p: Exponent of the norm, above 1.

    Example:
        >>> import torch
        >>> SqPNorm(2.0).paired(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([12.5000])
    """

    p: float
    name: ClassVar[str] = "sqpnorm"

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", check_number("p", self.p, above=1))

    def h(self, z: Tensor) -> Tensor:
        """Return ``|z|_p² / 2``."""
        return p_norm(z, self.p).square() / 2

    def grad_h_conjugate(self, w: Tensor) -> Tensor:
        """Return ``|w|_q^(2-q) sign(w) |w|^(q-1)`` with ``1/p + 1/q = 1``."""
        q = self.p / (self.p - 1)
        norm = p_norm(w, q)[..., None]
        return norm * w.sign() * (w.abs() / torch.where(norm > 0, norm, 1)).pow(q - 1)

    def regular_point(self, w: Tensor) -> Tensor:
        """Return ``w`` with no coordinate far below the largest one, as for :class:`PNorm`."""
        largest = w.abs().amax(-1, keepdim=True)
        return torch.where(largest > 0, _at_least(w, _regular_radius(1 / (self.p - 1)) * largest), 1)

    @property
    def formula(self) -> CostFormula:
        """The power of the sum of powers."""
        outer, slope = "power(s, 2 / q)", "2 / q * power(s, 2 / q - 1)"
        return CostFormula(*_power_and_slope(self.p), outer, slope, scale=0.5, number=self.p)

    @property
    def keops_formula(self) -> str:
        """The power of the sum of powers."""
        powers = f"Sum({_keops_power('Abs(X-Y)', self.p)})"
        return f"({rational(0.5)} * {_keops_power(powers, 2 / self.p)})"


@dataclass(frozen=True)
class Elastic(TranslationInvariantCost):
    r"""Elastic cost :math:`c(x, y) = \tfrac12 \|x - y\|_2^2 + \lambda \|x - y\|_1`, whose maps move few coordinates.

    Args:
        lam: Weight :math:`\lambda \ge 0` of the 1-norm.

    Example:
        >>> import torch
        >>> Elastic(1.0).paired(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([19.5000])
    """

    lam: float = 1.0
    name: ClassVar[str] = "elastic"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lam", check_number("lam", self.lam, least=0))

    def h(self, z: Tensor) -> Tensor:
        """Return ``|z|²/2 + λ|z|_1``."""
        return z.square().sum(-1) / 2 + self.lam * z.abs().sum(-1)

    def grad_h_conjugate(self, w: Tensor) -> Tensor:
        """Return ``w`` soft-thresholded at λ."""
        return w.sign() * (w.abs() - self.lam).clamp_min(0)

    def regular_point(self, w: Tensor) -> Tensor:
        """Return ``w`` with each coordinate's absolute value just above λ, where the threshold lets it pass."""
        return _at_least(w, 1.001 * self.lam + 1e-6)

    @property
    def formula(self) -> CostFormula:
        """Half the squared distance and the sum of absolute values."""
        return CostFormula("z * z / 2 + q * absolute(z)", "z + with_sign(z * 0 + q, z)", number=self.lam)

    @property
    def keops_formula(self) -> str:
        """Half the squared distance and the sum of absolute values."""
        return f"({rational(0.5)} * SqDist(X,Y) + {rational(self.lam)} * Sum(Abs(X-Y)))"


def _power_and_slope(p: float) -> tuple[str, str]:
    """Return ``|z|^p`` and its slope as C++; by what is faster than a power where there is that."""
    if p == 1:
        return "absolute(z)", "with_sign(z * 0 + 1, z)"
    if p == 1.5:
        return "absolute(z) * root(absolute(z))", "q * with_sign(root(absolute(z)), z)"
    if p == 2:
        return "z * z", "2 * z"
    return "power(absolute(z), q)", "q * with_sign(power(absolute(z), q - 1), z)"


def rational(value: float) -> str:
    """Return a KeOps constant, which can only be rational."""
    fraction = Fraction(value).limit_denominator(1000)
    if float(fraction) != value:
        fraction = Fraction(value)
    return f"RatCst({fraction.numerator},{fraction.denominator})"


def _keops_power(base: str, exponent: float) -> str:
    """Return a power whose gradient KeOps can derive for a rational exponent, and which is finite at 0."""
    return f"Exp({rational(exponent)} * Log({base} + RatCst(1,{10**36})))"


def _regular_radius(power: float) -> float:
    """Return the number at which ``|w|^power`` has slope 0.1 if it is flat at 0, and 10 if it is steep there."""
    # At 0 itself no power's slope is computed right: not even that of the first.
    return max(1e-6, ((0.1 if power > 1 else 10) / power) ** (1 / (power - 1))) if power != 1 else 1e-6


def _at_least(w: Tensor, radius: float | Tensor) -> Tensor:
    """Return ``w`` moved away from 0 to the radius, where it is closer."""
    return torch.where(w.abs() < radius, torch.where(w < 0, -1.0, 1.0).to(w) * radius, w)


def p_norm(z: Tensor, p: float) -> Tensor:
    """Return ``|z|_p`` over the last dimension, with gradient 0 where it is 0."""
    # Powers of numbers up to 1 neither overflow nor all vanish; the scale cancels, so it needs no gradient.
    scale = z.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    powers = (z / scale).abs().pow(p).sum(-1)
    positive = powers > 0
    return torch.where(positive, torch.where(positive, powers, 1).pow(1 / p), 0) * scale[..., 0]
