"""Problems whose matrices are in memory, by compiled C++: a call for the costs, and one for all that follows.

A step of training on some hundred samples is some thousand calls of :class:`DenseKernel`, whose time is most of it.
"""

import ctypes
import math
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs.formula import CostFormula, formula_of
from lightning_gap.monge.ot.epsilon import Epsilon
from lightning_gap.monge.ot.limits import LIMITS, STRIDE
from lightning_gap.monge.ot.options import SolverOptions
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.solvers.anderson import LONGEST_JUMP, MEMORY, PLAIN_SWEEPS, SLOW, STUCK
from lightning_gap.monge.ot.solvers.dense import DRIFT, FLAT
from lightning_gap.monge.ot.solvers.fused.pairs import FLOAT_RANGE, images_of, pulled_back
from lightning_gap.monge.ot.solvers.gradients import Answer
from lightning_gap.monge.ot.solvers.iterate import LEAP_SWEEPS, LEAPS, PATIENCE
from lightning_gap.monge.ot.solvers.kernel import REGULARIZATIONS
from lightning_gap.monge.ot.solvers.memory import buffers, thread_count
from lightning_gap.monge.ot.solvers.sizes import FLOAT_RATIOS, size_and_epsilon
from lightning_gap.native import native_library

__all__ = ["Found", "NativeProblem", "native_dense_library", "solve_natively"]

_SOURCE = Path(__file__).with_name("native_dense.cpp")
_CONSTANTS = {
    "MEMORY": MEMORY, "LONGEST_JUMP": LONGEST_JUMP, "PLAIN_SWEEPS": PLAIN_SWEEPS, "STUCK": STUCK, "SLOW": SLOW,
    "DRIFT": DRIFT, "FLAT": FLAT, "PATIENCE": PATIENCE, "LEAPS": LEAPS, "LEAP_SWEEPS": LEAP_SWEEPS, "STRIDE": STRIDE,
    "COARSEST": LIMITS.coarsest.cpu,
    "REGULARIZATION_FLOAT": REGULARIZATIONS[torch.float32], "REGULARIZATION_DOUBLE": REGULARIZATIONS[torch.float64],
}  # fmt: skip
# Columns are filled up to a multiple of this: vectors of floats of 64 bytes.
_VECTOR = 16
# Pairs of fewer samples are not worth a compilation.
_FEWEST = 1 << 12
# Samples of a side: fewer would be filled up to several times as many, and sums of more lose digits in float32.
_SIDE = 16, 1 << 18
# More sweeps than anyone makes, and than a long holds.
_SWEEPS = 1 << 62
# Rows that a thread takes at least.
_ROWS = 64
# Coordinates from which on products of matrices, of squares and of others, take less time than differences.
_SQUARES, _OTHERS = 128, 1024
# Sizes of sums of squares that are far from a format's limits; and for other powers the largest, and most digits.
_RANGES = {torch.float32: FLOAT_RANGE, torch.float64: (1e-200, 1e200)}
_POWER, _DIGITS = 24.0, 150.0
# What float32 knows of a sum of squares is enough.
_PLAIN = ("s", "root(s)")
_NAMES = {torch.float32: "float", torch.float64: "double"}
_POINTER, _LONG, _DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_double
_TO_SOLVE: list[Any] = [*[_POINTER] * 2, _DOUBLE, _DOUBLE, _LONG, _DOUBLE, _LONG, *[_POINTER] * 5]
_SAMPLES: list[Any] = [_POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG, _DOUBLE, _DOUBLE, _LONG, _POINTER, _POINTER]


# What a call finds: a number of Python, and gradients in the images that a cost compares.
Found: TypeAlias = Answer[float]


def native_dense_library(formula: CostFormula) -> ctypes.CDLL | None:
    """Return the calls for a cost; ``None`` where nothing compiles them."""
    # Looking for a compiler takes as long as a small solve.
    return _library(formula[:4], _is_plain(formula), os.environ.get("PATH"), os.environ.get("CXX"))


def _is_plain(formula: CostFormula) -> bool:
    """Return whether float32 is enough for float32 samples, as the differences of close ones are exact."""
    return formula.term == "z * z" and formula.outer in _PLAIN and formula.image is None and not formula.double


@cache
def _library(expressions: tuple[str, str, str, str], plain: bool, *compilers: str | None) -> ctypes.CDLL | None:
    numbers = {name: str(number) for name, number in _CONSTANTS.items()} | {"PLAIN": str(int(plain))}
    library = native_library(_SOURCE, CostFormula(*expressions).expressions() | numbers)
    if library is None:
        return None
    for matrix in _NAMES.values():
        # What is found by its name is kept with its types.
        costs, solve, paid = (getattr(library, f"{call}_{matrix}") for call in ("costs", "solve", "paid"))
        costs.argtypes, costs.restype = [*_SAMPLES, _POINTER, _POINTER], None
        solve.argtypes, solve.restype = [*_SAMPLES, *_TO_SOLVE], _LONG
        paid.argtypes, paid.restype = [*_SAMPLES, _POINTER], _DOUBLE
    return library


def _takes(p: Problem) -> CostFormula | None:
    """Return the formula of a problem with hard marginals, whose cost is this package's and its formula right."""
    (n, d), m = p.x.shape, p.y.shape[0]
    if p.rho is not None or p.x.device.type != "cpu" or n * m < _FEWEST:
        return None
    if min(n, m) < _SIDE[0] or max(n, m) > _SIDE[1]:
        return None
    formula = formula_of(p.cost) if type(p.cost).__module__.startswith("lightning_gap.") else None
    if formula is None:
        return None
    return formula if d <= (_SQUARES if formula.is_square and formula.image is None else _OTHERS) else None


class NativeProblem:
    """A problem without a graph as the calls take it: :meth:`of` says whether they do.

    Args:
        p: The problem.
        formula: Its cost's.
        library: The calls for that.
    """

    def __init__(self, p: Problem, formula: CostFormula, library: ctypes.CDLL) -> None:
        self.problem, self.formula, self.library = p, formula, library
        self.name, self.symmetric = _NAMES[p.x.dtype], p.to_itself
        coordinates = p.x.dtype if _is_plain(formula) else torch.float64
        self.x = _compared(formula, p.x, coordinates)
        self.y = self.x if self.symmetric else _compared(formula, p.y, coordinates)
        # Of uniform weights the calls know all.
        self.a = None if p.uniform else _normalized(p.a)
        self.b = self.a if p.uniform or p.b is p.a else _normalized(p.b)
        (n, d), m = self.x.shape, self.y.shape[0]
        self.padded = -(-m // _VECTOR) * _VECTOR
        self._samples = (
            self.x.data_ptr(), n, d, self.y.data_ptr(), m, self.padded, formula.scale, formula.number, _threads(n, m),
            _place(self.a), _place(self.b),
        )  # fmt: skip

    @classmethod
    def of(cls, p: Problem) -> "NativeProblem | None":
        """Return the problem as the calls take it; ``None`` where it is not for them, or nothing compiles them."""
        formula = _takes(p)
        library = None if formula is None else native_dense_library(formula)
        return None if formula is None or library is None else cls(p, formula, library)

    def solved(self, options: SolverOptions, need: tuple[bool, bool], *, epsilon: float | None = None) -> Found | None:
        """Return what is found, to a tolerance in so many sweeps, or ``None`` where it has to go the long way.

        Args:
            options: Tolerance and most sweeps.
            need: Whether the gradients in both sets of points are needed.
            epsilon: Another regularization than the problem's.
        """
        p, x, y, padded = self.problem, self.x, self.y, self.padded
        if epsilon is not None:
            p = replace(p, epsilon=Epsilon(epsilon))
        (n, d), m = x.shape, y.shape[0]
        told = (_DOUBLE * 3)()
        with buffers(1, 2 * n, padded, p.x) as (matrices,):
            C = matrices.data_ptr()
            K = C + n * padded * matrices.element_size()
            getattr(self.library, f"costs_{self.name}")(*self._samples, C, told)
            least, most, mean = told
            size = max(abs(least), abs(most))
            if not math.isfinite(mean) or not _in_range(self.formula, x, y, size):
                return None
            size, epsilon = size_and_epsilon(p, least, most, mean)
            if p.x.dtype == torch.float32 and not FLOAT_RATIOS[0] * epsilon <= size <= FLOAT_RATIOS[1] * epsilon:
                return None
            wanted = (any(need), False) if self.symmetric else need
            f, g = _doubles(n), _doubles(m)
            gx, gy = _doubles(n, d) if wanted[0] else None, _doubles(m, d) if wanted[1] else None
            iterations = getattr(self.library, f"solve_{self.name}")(
                *self._samples, C, K, epsilon, size, self.symmetric, options.tolerance,
                min(options.max_iterations, _SWEEPS), f.data_ptr(), g.data_ptr(), _place(gx), _place(gy), told,
            )  # fmt: skip
        if iterations < 0:
            return None
        value, error, converged = told
        return Found(value, f, g, gx, gx if self.symmetric else gy, epsilon, iterations, error, bool(converged))

    def paid(self, need: bool) -> tuple[float, Tensor | None]:
        """Return what the rows pay for the columns of their own numbers, and the gradient in the rows' images."""
        gradient = _doubles(*self.x.shape) if need else None
        return getattr(self.library, f"paid_{self.name}")(*self._samples, _place(gradient)), gradient


def solve_natively(p: Problem, options: SolverOptions, need: tuple[bool, bool]) -> Answer[Tensor] | None:
    """Solve a problem without a graph; ``None`` where it is not for this, or has to go the long way.

    Args:
        p: The problem.
        options: Tolerance and most sweeps.
        need: Whether the gradients in both sets of points are needed.
    """
    native = NativeProblem.of(p)
    found = None if native is None else native.solved(options, need)
    if native is None or found is None:
        return None
    gx = None if found.gx is None else pulled_back(native.formula, p.x, found.gx)
    gy = gx if native.symmetric else None if found.gy is None else pulled_back(native.formula, p.y, found.gy)
    value = torch.tensor(found.value, dtype=torch.float64, device="cpu")
    return Answer(value, found.f, found.g, gx, gy, *found[5:])


def _in_range(formula: CostFormula, x: Tensor, y: Tensor, size: float) -> bool:
    """Return whether no term leaves its format on the way, which would be a cost of nothing, or infinite."""
    if size == 0:
        return False
    low, high = _RANGES[x.dtype]
    if formula.term == "z * z":
        return low < (size / formula.scale if formula.outer == "s" else (size / formula.scale) ** 2) < high
    farthest = max(float((x.amax(0) - y.amin(0)).amax()), float((y.amax(0) - x.amin(0)).amax()))
    return formula.number <= _POWER and max(1.0, formula.number) * abs(math.log10(farthest)) <= _DIGITS


def _threads(n: int, m: int) -> int:
    return max(1, min(thread_count(n * m), n // _ROWS))


def _compared(formula: CostFormula, points: Tensor, dtype: torch.dtype) -> Tensor:
    # Without an image a point is what it was, without the way to double and back.
    return (points if formula.image is None else images_of(formula, points)).to(dtype).contiguous()


def _doubles(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device="cpu")


def _place(numbers: Tensor | None) -> int | None:
    return None if numbers is None else numbers.data_ptr()


def _normalized(w: Tensor) -> Tensor:
    w = w.to(torch.float64)
    return (w / w.sum()).contiguous()
