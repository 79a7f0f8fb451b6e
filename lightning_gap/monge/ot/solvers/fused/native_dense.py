"""Problems whose matrices are in memory, by compiled C++: one call for the costs, one for all that follows.

A step of training on some hundred samples is some thousand calls of :class:`DenseKernel`, whose time is most of it.
"""

import ctypes
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs.formula import CostFormula, formula_of
from lightning_gap.monge.ot.limits import LIMITS, STRIDE
from lightning_gap.monge.ot.options import SolverOptions
from lightning_gap.monge.ot.problem import Problem
from lightning_gap.monge.ot.solvers.anderson import LONGEST_JUMP, MEMORY, PLAIN_SWEEPS, STUCK
from lightning_gap.monge.ot.solvers.dense import DRIFT, FLAT
from lightning_gap.monge.ot.solvers.fused.pairs import FLOAT_RANGE, images_of, pulled_back
from lightning_gap.monge.ot.solvers.gradients import Answer
from lightning_gap.monge.ot.solvers.iterate import LEAP_SWEEPS, LEAPS, PATIENCE
from lightning_gap.monge.ot.solvers.kernel import REGULARIZATIONS
from lightning_gap.monge.ot.solvers.memory import buffers, thread_count
from lightning_gap.monge.ot.solvers.sizes import FLOAT_RATIOS, size_and_epsilon
from lightning_gap.native import native_library

__all__ = ["native_dense_library", "solve_natively"]

_SOURCE = Path(__file__).with_name("native_dense.cpp")
_CONSTANTS = {
    "MEMORY": MEMORY, "LONGEST_JUMP": LONGEST_JUMP, "PLAIN_SWEEPS": PLAIN_SWEEPS, "STUCK": STUCK, "DRIFT": DRIFT,
    "FLAT": FLAT, "PATIENCE": PATIENCE, "LEAPS": LEAPS, "LEAP_SWEEPS": LEAP_SWEEPS, "STRIDE": STRIDE,
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


def native_dense_library(formula: CostFormula) -> ctypes.CDLL | None:
    """Return the two calls for a cost; ``None`` where nothing compiles them."""
    # Looking for a compiler takes as long as a small solve.
    expressions = formula.expressions() | {"PLAIN": str(int(_is_plain(formula)))}
    return _library(tuple(expressions.items()), os.environ.get("PATH"), os.environ.get("CXX"))


def _is_plain(formula: CostFormula) -> bool:
    """Return whether float32 is enough for float32 samples, as the differences of close ones are exact."""
    return formula.term == "z * z" and formula.outer in _PLAIN and formula.image is None and not formula.double


@cache
def _library(expressions: tuple[tuple[str, str], ...], *compilers: str | None) -> ctypes.CDLL | None:
    library = native_library(_SOURCE, {name: str(number) for name, number in _CONSTANTS.items()} | dict(expressions))
    if library is None:
        return None
    for matrix in _NAMES.values():
        # What is found by its name is kept with its types.
        costs, solve = getattr(library, f"costs_{matrix}"), getattr(library, f"solve_{matrix}")
        costs.argtypes, costs.restype = [*_SAMPLES, _POINTER, _POINTER], None
        solve.argtypes, solve.restype = [*_SAMPLES, *_TO_SOLVE], _LONG
    return library


def _takes(p: Problem) -> CostFormula | None:
    """Return the formula of a problem with hard marginals, whose cost is this package's and its formula right."""
    pairs = len(p.x) * len(p.y)
    if p.rho is not None or p.x.device.type != "cpu" or pairs < _FEWEST:
        return None
    if min(len(p.x), len(p.y)) < _SIDE[0] or max(len(p.x), len(p.y)) > _SIDE[1]:
        return None
    formula = formula_of(p.cost) if type(p.cost).__module__.startswith("lightning_gap.") else None
    if formula is None:
        return None
    return formula if p.x.shape[1] <= (_SQUARES if formula.is_square and formula.image is None else _OTHERS) else None


def solve_natively(p: Problem, options: SolverOptions, need: tuple[bool, bool]) -> Answer | None:
    """Solve a problem without a graph; ``None`` where it is not for this, or has to go the long way.

    Args:
        p: The problem.
        options: Tolerance and most sweeps.
        need: Whether the gradients in both sets of points are needed.
    """
    formula = _takes(p)
    library = None if formula is None else native_dense_library(formula)
    if formula is None or library is None:
        return None
    dtype = p.x.dtype
    coordinates = dtype if _is_plain(formula) else torch.float64
    x = _compared(formula, p.x, coordinates)
    y = x if p.to_itself else _compared(formula, p.y, coordinates)
    a = _normalized(p.a)
    b = a if p.b is p.a else _normalized(p.b)
    n, m = len(x), len(y)
    padded = -(-m // _VECTOR) * _VECTOR
    samples = (
        x.data_ptr(), n, x.shape[1], y.data_ptr(), m, padded, formula.scale, formula.number, _threads(n, m),
        a.data_ptr(), b.data_ptr(),
    )  # fmt: skip
    form, solve = getattr(library, f"costs_{_NAMES[dtype]}"), getattr(library, f"solve_{_NAMES[dtype]}")
    with buffers(2, n, padded, p.x) as (C, K):
        told = torch.empty(3, dtype=torch.float64, device="cpu")
        form(*samples, C.data_ptr(), told.data_ptr())
        least, most, mean = told.tolist()
        size = max(abs(least), abs(most))
        if not math.isfinite(mean) or not _in_range(formula, x, y, size):
            return None
        size, epsilon = size_and_epsilon(p, least, most, mean)
        if dtype == torch.float32 and not FLOAT_RATIOS[0] * epsilon <= size <= FLOAT_RATIOS[1] * epsilon:
            return None
        f, g = (torch.empty(count, dtype=torch.float64, device="cpu") for count in (n, m))
        wanted = (any(need), False) if p.to_itself else need
        gx, gy = (
            torch.empty(points.shape, dtype=torch.float64, device="cpu") if wants else None
            for points, wants in zip((x, y), wanted, strict=True)
        )
        iterations = solve(
            *samples, C.data_ptr(), K.data_ptr(), epsilon, size, p.to_itself, options.tolerance,
            min(options.max_iterations, _SWEEPS),
            f.data_ptr(), g.data_ptr(), gx if gx is None else gx.data_ptr(), gy if gy is None else gy.data_ptr(),
            told.data_ptr(),
        )  # fmt: skip
    if iterations < 0:
        return None
    value, error, converged = told.tolist()
    gx = None if gx is None else pulled_back(formula, p.x, gx)
    gy = gx if p.to_itself else None if gy is None else pulled_back(formula, p.y, gy)
    return Answer(torch.tensor(value, dtype=torch.float64), f, g, gx, gy, epsilon, iterations, error, bool(converged))


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


def _normalized(w: Tensor) -> Tensor:
    w = w.to(torch.float64)
    return (w / w.sum()).contiguous()
