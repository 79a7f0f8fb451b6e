"""Metrics for torchmetrics: the distance from the initial weights, and the laws fitted to a curve of distances."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_gap.diffusion.distance import (
    ParameterFilter,
    check_filter,
    displacement_from_squares,
    square_sums,
    tracked_parameters,
)
from lightning_gap.diffusion.fit import DiffusionFit, fit_diffusion
from lightning_gap.diffusion.plot import plot_diffusion
from lightning_gap.extras import library
from lightning_gap.precision import widest
from lightning_gap.trainer.internals.of_lightning import default_states, plot_metric

__all__ = ["UltraSlowDiffusionFit", "WeightDistance"]


class _WideMetric(Metric):
    """A metric whose states are in the widest floating-point format of the device that they are on."""

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> nn.Module:
        dtype = widest(fn(torch.zeros(1, device=self.device)).device)
        if dtype != torch.float64:  # before they get there

            def narrowed(state: Any) -> Any:
                return state.to(dtype) if isinstance(state, Tensor) else [part.to(dtype) for part in state]

            defaults = default_states(self)
            for name, default in defaults.items():
                defaults[name] = narrowed(default)
                setattr(self, name, narrowed(getattr(self, name)))
        return super()._apply(fn, exclude_state)


class WeightDistance(_WideMetric):
    r"""How far a module's weights are from where they were when the metric was made: ‖w_t − w_0‖₂.

    For training loops without :class:`lightning_gap.UltraSlowDiffusion`, which also knows shards. The anchor w_0 is in
    the metric's buffers, so it follows ``.to(device)``, and it is in its ``state_dict``, so a resumed run keeps it:
    make the metric an attribute of your module. ``reset`` forgets the last distance and keeps w_0. Under DDP all
    processes hold the same weights, and their values are not added.

    Args:
        module: The module, with its initial weights: parameters with ``requires_grad=True``, tied ones once.
        relative: Divide by ‖w_0‖₂.
        exclude: Parameters that are not measured: a regular expression searched for in the name, or a function of name
            and parameter.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: No parameter is left, ``exclude`` is neither, parameters are sharded, or a module that is measured
            has other parameters.

    Example:
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> metric = WeightDistance(layer)
        >>> with torch.no_grad():
        ...     _ = layer.weight.add_(0.5)
        >>> metric.update(layer)
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    is_differentiable: bool = False
    higher_is_better: bool | None = None
    # The latest value counts: `forward` must not merge it with the one before.
    full_state_update: bool = True
    plot_lower_bound: float = 0.0
    displacement: Tensor

    def __init__(
        self, module: nn.Module, *, relative: bool = False, exclude: ParameterFilter | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if exclude is not None:
            check_filter("exclude", exclude)
        weights = tracked_parameters(module, exclude=exclude)
        if not weights:
            raise ValueError("module has no parameter with requires_grad=True that is not excluded: exclude less")
        if any(isinstance(weight, DTensor) for weight in weights.values()):
            raise ValueError("module has sharded parameters (DTensor): use the callback UltraSlowDiffusion")
        self.relative, self._names = relative, list(weights)
        for row, weight in enumerate(weights.values()):
            self.register_buffer(f"anchor_{row}", weight.clone())
        start = torch.tensor(math.nan, dtype=widest(self.device), device=self.device)
        self.add_state("displacement", default=start, dist_reduce_fx="max")

    def update(self, module: nn.Module) -> None:
        """Measure the module as it is now.

        Args:
            module: The module the metric was made with, or one with the same parameters.
        """
        anchor = {name: self.get_buffer(f"anchor_{row}") for row, name in enumerate(self._names)}
        named = dict(module.named_parameters())
        if changed := [name for name in anchor if name not in named or named[name].shape != anchor[name].shape]:
            raise ValueError(f"module must have the parameters of the one at the start, {changed[0]} is not there")
        weights = {name: named[name].detach() for name in anchor}
        distance2 = float(square_sums(weights, anchor)[:, 0].sum())
        norm2 = float(square_sums(anchor, anchor)[:, 1].sum()) if self.relative else 1.0
        moved = displacement_from_squares(distance2, norm2, math.sqrt(norm2))
        value = moved.relative_distance if self.relative else moved.distance
        self.displacement = torch.full_like(self.displacement, value)

    def compute(self) -> Tensor:
        """Return the distance at the last update, float64 where the device has it; NaN before the first."""
        return self.displacement

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Draw one or several values.

        Args:
            val: A value, or one for each step; :meth:`compute` by default.
            ax: Matplotlib axes to draw on; new ones by default.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed.
        """
        library("matplotlib", f"{type(self).__name__}.plot()", "plots")
        return plot_metric(self, val, ax)


class UltraSlowDiffusionFit(_WideMetric):
    r"""The laws a + b·log t and c·t^p fitted to all distances it was given; see :func:`fit_diffusion`.

    Points may come in any order, one or many at a time, and from several processes; where one update is given more than
    once, as under DDP, its first distance counts. Distances that are NaN or infinite are left out, with a warning.

    Args:
        minimum_decades: :meth:`compute` refuses data that span less.
        confidence: Of the intervals.
        kwargs: Options of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = UltraSlowDiffusionFit()
        >>> for t in (1, 3, 10, 30, 100, 300, 1000):
        ...     metric.update(t, 0.5 + 2.0 * math.log(t))
        >>> values = metric.compute()
        >>> round(float(values["log_slope"]), 6), round(float(values["log_r2"]), 6)
        (2.0, 1.0)
    """

    is_differentiable: bool = False
    higher_is_better: bool | None = None
    full_state_update: bool = False
    updates: list[Tensor]
    distances: list[Tensor]

    def __init__(self, *, minimum_decades: float = 2.0, confidence: float = 0.95, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.minimum_decades, self.confidence = minimum_decades, confidence
        for name in ("updates", "distances"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, updates: float | Tensor, distances: float | Tensor) -> None:
        """Add points.

        Args:
            updates: t, a number or (n,).
            distances: ‖w_t − w_0‖ at each, of the same shape.

        Raises:
            ValueError: The shapes differ.
        """
        t, d = (self._wide(values) for values in (updates, distances))
        if t.shape != d.shape or t.ndim != 1:
            raise ValueError(f"updates and distances must be two numbers or vectors, got {t.shape} and {d.shape}")
        self.updates.append(t)
        self.distances.append(d)

    def fit(self) -> DiffusionFit:
        """Return the fit of all points of this process, with everything :class:`DiffusionFit` holds.

        Raises:
            ValueError: As :func:`fit_diffusion`; most often that the points span too few decades.
        """
        t, d = self._points()
        return fit_diffusion(t, d, minimum_decades=self.minimum_decades, confidence=self.confidence)

    def compute(self) -> dict[str, Tensor]:
        """Return :meth:`DiffusionFit.numbers`: slope, exponent, both R², Akaike weight, α, and intervals.

        Raises:
            ValueError: As :meth:`fit`.
        """
        return {
            name: torch.tensor(value, dtype=widest(self.device), device=self.device)
            for name, value in self.fit().numbers().items()
        }

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the points and both laws against log t.

        Args:
            val: Not used: the points are drawn, not the values.
            ax: Matplotlib axes to draw on; new ones by default.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: Matplotlib is not installed.
            ValueError: As :meth:`fit`.
        """
        t, d = self._points()
        return plot_diffusion({"updates": t.tolist(), "distance": d.tolist()}, self.fit(), ax=ax)

    def _wide(self, values: Any) -> Tensor:
        dtype = widest(self.device)
        if not isinstance(values, Tensor):
            wide = torch.as_tensor(values, dtype=dtype, device=self.device)
        elif dtype == torch.float64:  # it may come from a device without double, or go to one
            wide = values.detach().to(self.device).to(dtype)
        else:
            wide = values.detach().to(dtype).to(self.device)
        return wide.reshape(1) if wide.ndim == 0 else wide

    def _points(self) -> tuple[Tensor, Tensor]:
        if not self.updates:
            raise ValueError("UltraSlowDiffusionFit has no points yet: call update(updates, distances) first")
        t, d = dim_zero_cat(self.updates), dim_zero_cat(self.distances)
        order = t.argsort(stable=True)
        t, d = t[order], d[order]
        first = torch.cat([t.new_ones(1, dtype=torch.bool), t.diff() != 0])
        t, d = t[first], d[first]
        finite = d.isfinite()
        if not finite.all():
            rank_zero_warn(
                f"UltraSlowDiffusionFit leaves out {int((~finite).sum())} distances that are NaN or infinite, from the "
                f"one at update {float(t[~finite][0]):g} on."
            )
        return t[finite], d[finite]
