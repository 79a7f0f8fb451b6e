"""Soft minima and gradients over all pairs of samples, by Triton on a GPU."""

import ast
import hashlib
import linecache
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_gap.monge.ot.costs.formula import CostFormula
from lightning_gap.monge.ot.solvers.fused.pairs import PairPasses

__all__ = ["TritonPasses", "has_triton", "triton_expressions", "triton_failure"]

# Rows of a tile, and its numbers in float; in double a quarter, which the registers hold.
_ROWS, _NUMBERS = 16, 1 << 13
# Coordinates whose gradients are summed at once.
_MOST_SLOPES = 16
# Programs that keep a multiprocessor busy; where rows make fewer, the columns are split.
_PROGRAMS = 8
_WARPS = 4


class TritonPasses(PairPasses):
    """Passes over pairs on a GPU, each by a kernel that a formula's expressions are compiled into."""

    sums_columns: ClassVar[bool] = False

    def _keep(self, rows: Tensor, columns: Tensor) -> None:
        expressions = triton_expressions(self.formula)
        assert expressions is not None
        self._expressions, numbers = expressions, _NUMBERS if self.dtype == torch.float32 else _NUMBERS // 4
        self._width, d = numbers // _ROWS, rows.shape[1]
        self._slopes = min(_MOST_SLOPES, 1 << (d - 1).bit_length())
        self._slope_width = self._width // self._slopes
        self._d, places = d, -(-d // self._slopes) * self._slopes
        self._scaled_rows = rows if self.by_products else None
        self._X, self._Y = _by_coordinates(rows, places, _ROWS), _by_coordinates(columns, places, self._width)
        self._numbers = rows.new_tensor([self.scale, float(self.formula.number)])

    def transposed(self) -> "TritonPasses":
        """Return the passes with rows and columns exchanged, whose costs are rounded as these are."""
        return type(self)(self.y, self.x, self.cost.transposed(), self.epsilon, self.size, self.middle)

    def soft_minimum(
        self, G: Tensor, b: Tensor, *, share: float = 1.0, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return soft minima, and the columns' sums by another pass, as a row's minimum is known at its end."""
        F = self._soft_minimum(G, b, share)
        if weights is None:
            return F, None
        return F, (G - self.transposed().soft_minimum(F, weights)[0]).exp()

    def _soft_minimum(self, G: Tensor, b: Tensor, share: float) -> Tensor:
        n, (_, filled), m = len(self.x), self._X.shape, self._Y.shape[1]
        offsets, own = self._offsets(G, b)
        blocks, tiles = filled // _ROWS, m // self._width
        splits = max(1, min(tiles, _PROGRAMS * _multiprocessors(self._X.device) // blocks))
        part = -(-tiles // splits)
        splits = -(-tiles // part)
        tops, sums = self._X.new_empty(splits, filled), own.new_empty(splits, filled)
        offsets = self._filled(offsets, m)
        self._launch(
            "soft_minimum", (blocks, splits), self._X, self._Y, offsets, self._numbers, tops, sums, filled, m, self._d,
            part * self._width, ROWS=_ROWS, COLUMNS=self._width,
        )  # fmt: skip
        return torch.logsumexp(tops.to(sums.dtype) + sums.log(), 0)[:n].add_(own).mul_(-share)

    def _pulls(self, potentials: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        (n, d), (places, filled), m = (len(self.x), self._d), self._X.shape, self._Y.shape[1]
        own = self._X.new_zeros(filled)
        own[:n] = potentials
        gradients, masses = potentials.new_empty(places, filled), potentials.new_empty(filled)
        offsets = self._filled(offsets, m)
        self._launch(
            "pull", (filled // _ROWS, places // self._slopes), self._X, self._Y, offsets, own, self._numbers, gradients,
            masses, filled, m, d, ROWS=_ROWS, COLUMNS=self._slope_width, SLOPES=self._slopes,
        )  # fmt: skip
        gradients, masses = gradients[:d, :n].mT.contiguous(), masses[:n]
        if self._scaled_rows is not None:
            gradients = self._scaled_rows * masses[:, None] - 2 * self.scale * gradients
        return gradients, masses

    def _launch(self, name: str, grid: tuple[int, int], *arguments: Tensor | int, **sizes: int) -> None:
        from lightning_gap.monge.ot.solvers.fused import triton_kernels as kernels

        kernel = getattr(kernels, name)
        formula = {key: function for key, function in self._expressions.items() if key in kernel.arg_names}
        exponential = kernels.tl.float32 if self.exponential == torch.float32 else kernels.tl.float64
        options = {"PRODUCTS": self.by_products, "EXPONENTIAL": exponential, **sizes}
        device = self._X.device
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                # Products and sums in one operation, which a later release would leave out unless told.
                kernel[grid](*arguments, **formula, **options, num_warps=_WARPS, enable_fp_fusion=True)
        except Exception as error:  # of the compiler, of the driver, or of a GPU that Triton does not know
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RuntimeError(f"Triton does not run on {device} here ({told}): use solver='blocked'") from error


def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def triton_failure() -> str | None:
    """Return why Triton, where it is installed, cannot be imported; else ``None``."""
    if not has_triton():
        return None
    from lightning_gap.monge.ot.solvers.fused import triton_kernels

    return triton_kernels.failure


def triton_expressions(formula: CostFormula) -> Mapping[str, Any] | None:
    """Return a formula's expressions as functions of kernels; ``None`` without Triton, or where they are no Python."""
    return _functions(tuple(formula.expressions().items())) if has_triton() and not triton_failure() else None


@cache
def _functions(expressions: tuple[tuple[str, str], ...]) -> Mapping[str, Any] | None:
    from lightning_gap.monge.ot.solvers.fused.triton_kernels import VOCABULARY

    lines = ["import triton", "import triton.language as tl"]
    for name, text in expressions:
        variable = "z" if name.startswith("TERM") else "s"
        try:
            names = {node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)}
        except SyntaxError:  # C++ that is no Python
            return None
        if not names <= {variable, "q", *VOCABULARY}:
            return None
        lines += ["", "", "@triton.jit", f"def {name}({variable}, q):", f"    return {text}"]
    source = "\n".join([*lines, ""])
    # Triton reads the source of what it compiles, by the name of its file.
    file = f"<formula {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    functions: dict[str, Any] = {"__name__": __name__, **VOCABULARY}
    exec(compile(source, file, "exec"), functions)
    return {name: functions[name] for name, _ in expressions}


def _by_coordinates(points: Tensor, places: int, multiple: int) -> Tensor:
    """Return ``(places, k)`` coordinates of points, filled up to a multiple of points."""
    n, d = points.shape
    filled = points.new_zeros(places, -(-n // multiple) * multiple)
    filled[:d, :n] = points.mT
    return filled


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
