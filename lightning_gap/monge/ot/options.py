"""How a solver is to solve: one value, checked when it is made."""

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_gap.checks import check_choice, check_integer

__all__ = ["Solver", "SolverOptions"]

Solver = Literal["auto", "dense", "fused", "flash", "blocked", "exact", "tensorized", "online", "multiscale"]


@dataclass(frozen=True)
class SolverOptions:
    """Which solver, at which L1 marginal error it stops, and after how many sweeps at most."""

    solver: Solver = "auto"
    tolerance: float = 1e-5
    max_iterations: int = 2000

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, get_args(Solver))
        if self.solver == "tensorized":
            warnings.warn(
                "solver='tensorized' is no longer a solver of its own: solver='dense', which takes the same memory and "
                "solves to a tolerance, is run instead",
                DeprecationWarning,
                stacklevel=4,
            )
            object.__setattr__(self, "solver", "dense")
        number = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
        if not number or not 0 < self.tolerance < 2:
            raise ValueError(f"tolerance must be in (0, 2), an L1 marginal error, got {self.tolerance!r}")
        check_integer("max_iterations", self.max_iterations)
