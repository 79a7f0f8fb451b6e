"""The curve of distances, with the laws, the drops of the learning rate and the reference."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_gap.diffusion.fit import DiffusionFit
from lightning_gap.diffusion.grid import constant_lr_segments
from lightning_gap.diffusion.reference import ReferenceRun
from lightning_gap.extras import library

__all__ = ["plot_diffusion"]

_MOST_DROPS = 20


def plot_diffusion(
    trace: Mapping[str, Sequence[float]],
    fit: DiffusionFit | None = None,
    reference: ReferenceRun | None = None,
    *,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw ‖w_t − w_0‖ against log t.

    Args:
        trace: ``updates`` and ``distance``; with ``learning_rate`` too, its changes are marked by vertical lines,
            unless there are more than 20.
        fit: Draws both of its laws over the updates that were fitted.
        reference: Draws another run beneath.
        ax: Matplotlib axes to draw on; new ones by default.

    Returns:
        The figure and its axes.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
    """
    ax = axes_or_new(ax)
    updates = trace["updates"]
    if reference is not None:
        ax.plot(reference.updates, reference.distances, color="0.6", label="reference")
    ax.plot(updates, trace["distance"], ".", color="C0", label="this run")
    if fit is not None:
        t = np.geomspace(fit.first_update, fit.last_update, 200).tolist()
        ax.plot(t, fit.log_law(t), "-", color="C1", label=f"a + b·log t, R² {fit.log_r2:.4f}")
        ax.plot(t, fit.power_law(t), "--", color="C2", label=f"c·tᵖ, R² {fit.power_r2:.4f}")
    drops = [segment.start for segment in constant_lr_segments(list(trace.get("learning_rate", ())))][1:]
    for drop in drops if len(drops) <= _MOST_DROPS else ():
        ax.axvline(updates[drop], color="0.3", linestyle=":", linewidth=1)
    ax.set(xscale="log", xlabel="updates t", ylabel="‖wₜ − w₀‖")
    ax.legend()
    return ax.figure, ax


def axes_or_new(ax: Any) -> Any:
    """Return Matplotlib axes, new ones where there are none."""
    if ax is None:
        ax = library("matplotlib.pyplot", "plot()", "plots").subplots()[1]
    return ax
