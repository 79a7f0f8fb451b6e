"""Passes over all pairs of samples in Triton: costs, exponentials, sums and gradients, without a matrix.

As in ``soft_minimum.cpp``, the cost is ``scale * OUTER(sum_k TERM(x_k - y_k))`` in units of epsilon. A program takes
``ROWS`` rows and meets the columns ``COLUMNS`` at a time, with a running maximum. Points lie by coordinates, so that
neighbours are loaded together, and are filled up to whole tiles: nothing is masked. A thread has few rows and several
columns of a tile, so that a coordinate that is loaded serves many pairs. Places are 64-bit numbers.
"""

from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr

    failure: str | None = None
except (ImportError, OSError, AttributeError) as error:  # without a GPU's wheels of torch; or it is damaged
    triton = tl = None
    constexpr = Any
    failure = (str(error).strip() or type(error).__name__).splitlines()[0]

__all__ = ["VOCABULARY", "failure", "pull", "soft_minimum", "tl", "triton"]


def _jit(function: Any) -> Any:
    # Lengths change from call to call, and are not worth a compilation.
    return function if triton is None else triton.jit(function, do_not_specialize=["n", "m", "part"])


def _word(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


@_word
def absolute(z):
    return tl.abs(z)


@_word
def root(v):
    return tl.sqrt(v)


@_word
def inverse(v):
    positive = v > 0
    return tl.where(positive, 1 / tl.where(positive, v, 1.0), 0.0)


@_word
def with_sign(v, z):
    return tl.where(z == 0, 0.0, tl.where(z < 0, -v, v))


@_word
def power(v, q):
    positive = v > 0
    return tl.where(positive, tl.exp2(q * tl.log2(tl.where(positive, v, 1.0))), tl.where(q == 0, 1.0, 0.0))


# By the series up to 1/2, and beyond as pi / 2 - 2 arcsin sqrt((1 - v) / 2).
@_word
def arcsine(v):
    v = tl.minimum(v, 1.0)
    far = v > 0.5
    u = tl.where(far, tl.sqrt((1 - v) / 2), v)
    square = u * u
    term = u
    total = u
    for k in tl.static_range(1, 24):
        term = term * square * ((2 * k - 1) / (2 * k))
        total += term / (2 * k + 1)
    return tl.where(far, 1.57079632679489661923 - 2 * total, total)


# What expressions are written in.
VOCABULARY = {
    "absolute": absolute,
    "root": root,
    "inverse": inverse,
    "with_sign": with_sign,
    "power": power,
    "arcsine": arcsine,
}


# Sums over the coordinates, of terms or of products.
@_word
def _sums(
    X, Y, rows, columns, n, m, d, q,
    TERM: constexpr, PRODUCTS: constexpr, ROWS: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    s = tl.zeros([ROWS, COLUMNS], X.dtype.element_ty)
    for k in range(d):
        x = tl.load(X + k * n + rows)[:, None]
        y = tl.load(Y + k * m + columns)[None, :]
        if PRODUCTS:
            s += x * y
        else:
            s += TERM(x - y, q)
    return s


@_jit
def soft_minimum(
    X, Y, OFFSETS, NUMBERS, TOPS, SUMS, n, m, d, part,
    TERM: constexpr, OUTER: constexpr, PRODUCTS: constexpr, EXPONENTIAL: constexpr,
    ROWS: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """Write the largest exponent of each row and the sum of exponentials, of ``part`` columns from a split's first."""
    n, m = tl.cast(n, tl.int64), tl.cast(m, tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1).to(tl.int64)
    scale, q = tl.load(NUMBERS), tl.load(NUMBERS + 1)
    top = tl.full([ROWS], -float("inf"), X.dtype.element_ty)
    total = tl.zeros([ROWS], tl.float64)
    for start in range(split * part, tl.minimum(split * part + part, m), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        s = _sums(X, Y, rows, columns, n, m, d, q, TERM, PRODUCTS, ROWS, COLUMNS)
        offsets = tl.load(OFFSETS + columns)[None, :]
        exponents = offsets + (s if PRODUCTS else -scale * OUTER(s, q))
        higher = tl.maximum(top, tl.max(exponents, 1))
        part_sums = tl.sum(tl.exp((exponents - higher[:, None]).to(EXPONENTIAL)), 1)
        total = total * tl.exp((top - higher).to(EXPONENTIAL)).to(tl.float64) + part_sums.to(tl.float64)
        top = higher
    tl.store(TOPS + split * n + rows, top)
    tl.store(SUMS + split * n + rows, total)


@_jit
def pull(
    X, Y, OFFSETS, POTENTIALS, NUMBERS, GRADIENTS, MASSES, n, m, d,
    TERM: constexpr, TERM_SLOPE: constexpr, OUTER: constexpr, OUTER_SLOPE: constexpr,
    PRODUCTS: constexpr, EXPONENTIAL: constexpr,
    ROWS: constexpr, COLUMNS: constexpr, SLOPES: constexpr,
):  # fmt: skip
    """Write the rows' masses, and sums of shares times the cost's slopes in some coordinates; as products, times y.

    Shares are ``exp(F_i + offset_j - cost_ij)``, formed anew for each ``SLOPES`` coordinates.
    """
    n, m = tl.cast(n, tl.int64), tl.cast(m, tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    coordinates = tl.program_id(1).to(tl.int64) * SLOPES + tl.arange(0, SLOPES)
    scale, q = tl.load(NUMBERS), tl.load(NUMBERS + 1)
    potentials = tl.load(POTENTIALS + rows)[:, None]
    here = tl.load(X + coordinates[None, :] * n + rows[:, None])[:, None, :]
    mass = tl.zeros([ROWS], tl.float64)
    found = tl.zeros([ROWS, COLUMNS, SLOPES], X.dtype.element_ty)
    for start in range(0, m, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        s = _sums(X, Y, rows, columns, n, m, d, q, TERM, PRODUCTS, ROWS, COLUMNS)
        offsets = tl.load(OFFSETS + columns)[None, :]
        exponents = potentials + offsets + (s if PRODUCTS else -scale * OUTER(s, q))
        shares = tl.exp(exponents.to(EXPONENTIAL)).to(X.dtype.element_ty)
        mass += tl.sum(shares, 1).to(tl.float64)
        there = tl.load(Y + coordinates[None, :] * m + columns[:, None])[None, :, :]
        if PRODUCTS:
            found += shares[:, :, None] * there
        else:
            shares = shares * scale * OUTER_SLOPE(s, q)
            found += shares[:, :, None] * TERM_SLOPE(here - there, q)
    tl.store(GRADIENTS + coordinates[None, :] * n + rows[:, None], tl.sum(found.to(tl.float64), 1))
    tl.store(MASSES + rows, mass)
