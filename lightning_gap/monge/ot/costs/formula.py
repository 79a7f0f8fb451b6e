"""Costs as expressions that a compiler takes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

if TYPE_CHECKING:
    from lightning_gap.monge.ot.costs.base import Cost

__all__ = ["SQUARES", "CostFormula", "formula_of"]


class CostFormula(NamedTuple):
    r"""A cost :math:`c(x, y) = w \, g(\sum_k h(T(x)_k - T(y)_k))`, in C++ for the fused solver.

    Expressions are of vectors of numbers, in ``z``, the difference, ``s``, the sum, and ``q``, a number. They know
    ``absolute(z)``, ``root(s)``, ``power(s, q)`` of what is not negative, ``inverse(s)``, which is 0 at 0, and
    ``with_sign(z, of)``, which is 0 where ``of`` is; and ``arcsine(s)``. Those of these words, numbers and ``+ - * /``
    alone are Python as well, which a GPU's Triton compiles.

    Attributes:
        term: :math:`h`, an even function of ``z``, as ``"z * z"``.
        term_slope: :math:`h'`.
        outer: :math:`g` of ``s``.
        outer_slope: :math:`g'`.
        scale: :math:`w`.
        number: ``q``, which does not need another compilation when it changes.
        image: :math:`T`, ``(n, d)`` points to ``(n, k)`` points in the widest format; ``None`` for the identity.
        double: Whether it is taken in double for samples in float32, too, of whose digits the expressions lose many.

    Example:
        >>> CostFormula("absolute(z)", "with_sign(z * 0 + 1, z)").outer  # a city block
        's'
    """

    term: str
    term_slope: str
    outer: str = "s"
    outer_slope: str = "s * 0 + 1"
    scale: float = 1.0
    number: float = 0.0
    image: Callable[[Tensor], Tensor] | None = None
    double: bool = False

    @property
    def is_square(self) -> bool:
        """Whether the cost is a squared distance, which is a product of augmented points."""
        return self.term == "z * z" and self.outer == "s"

    def expressions(self) -> dict[str, str]:
        """Return the expressions by the names of their macros."""
        return {
            "TERM": self.term,
            "TERM_SLOPE": self.term_slope,
            "OUTER": self.outer,
            "OUTER_SLOPE": self.outer_slope,
        }


# Squared distances.
SQUARES = CostFormula("z * z", "2 * z")


# Looking through a class takes as long as a hundred costs; those of a notebook are let go of as it defines them anew.
_of_their_formula: "WeakKeyDictionary[type[Cost], bool]" = WeakKeyDictionary()


def formula_of(cost: "Cost") -> CostFormula | None:
    """Return a cost's formula; ``None`` where a class has changed the cost and inherits the formula of another."""
    known = _of_their_formula.get(type(cost))
    if known is None:
        known = _of_their_formula[type(cost)] = _is_of_its_formula(type(cost))
    return cost.formula if known else None


def _is_of_its_formula(cost: type["Cost"]) -> bool:
    def place(name: str) -> int:
        return next((i for i, each in enumerate(cost.__mro__) if name in vars(each)), len(cost.__mro__))

    changed = min(place(name) for name in ("h", "elementwise", "paired", "pairwise", "geometry"))
    return place("formula") <= changed
