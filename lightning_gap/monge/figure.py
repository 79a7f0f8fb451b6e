"""The picture of a transport map: where samples go, beside where they should."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from lightning_gap.loggers import log_figure

__all__ = ["MapFigure", "plot_map"]

_SOURCE, _TARGET, _MAPPED = "#2f68b0", "#9aa2ad", "#c2512f"
_ARROWS = 150


def principal_plane(samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the two directions of largest variance, ``(d, 2)``, each with its largest entry positive."""
    directions = np.linalg.svd(samples - samples.mean(0), full_matrices=False)[2][:2].T
    largest = np.abs(directions).argmax(0)
    return np.asarray(directions * np.sign(directions[largest, range(directions.shape[1])]))


def plot_map(
    source: NDArray[Any],
    mapped: NDArray[Any],
    target: NDArray[Any],
    *,
    plane: NDArray[np.float64] | None = None,
    ax: Any,
) -> Any:
    """Draw the target, and a line from each sample to its image; in one dimension, the graph of the map.

    Args:
        source: ``(n, d)`` samples.
        mapped: ``(n, d)`` their images.
        target: ``(m, d)`` samples of the target.
        plane: ``(d, 2)`` directions to draw along; for d > 2 the two principal ones of the target by default.
        ax: Matplotlib axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: The shapes do not fit each other.
    """
    source, mapped, target = (np.asarray(x, dtype=np.float64) for x in (source, mapped, target))
    if source.ndim != 2 or source.shape != mapped.shape or target.shape[1:] != source.shape[1:]:
        raise ValueError(
            f"source {source.shape}, mapped {mapped.shape} and target {target.shape} must be (n, d), (n, d) and (m, d)"
        )
    if source.shape[1] == 1:
        order = source[:, 0].argsort()
        ax.plot(source[order, 0], mapped[order, 0], color=_MAPPED, lw=1.5, label="T(x)")
        ax.plot(source[order, 0], source[order, 0], color=_TARGET, lw=0.8, ls="--", label="x")
        ax.set(xlabel="x", ylabel="T(x)")
    else:
        labels = ("first coordinate", "second coordinate")
        if plane is None and source.shape[1] > 2:
            plane = principal_plane(target)
        if plane is not None:
            source, mapped, target = source @ plane, mapped @ plane, target @ plane
            labels = ("first principal direction of the target", "second principal direction")
        ax.plot(*target.T, "o", ms=2.5, mec="none", alpha=0.6, color=_TARGET, label="target")
        ax.plot(*np.stack([source[:_ARROWS], mapped[:_ARROWS]]).transpose(2, 0, 1), lw=0.6, alpha=0.45, color=_SOURCE)
        ax.plot(*source.T, "o", ms=2.5, mec="none", alpha=0.8, color=_SOURCE, label="source x")
        ax.plot(*mapped.T, "o", ms=2.5, mec="none", alpha=0.8, color=_MAPPED, label="images T(x)")
        ax.set(xlabel=labels[0], ylabel=labels[1])
        ax.set_aspect("equal", adjustable="datalim")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, ncols=3, markerscale=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    return ax


class MapFigure(Callback):
    """Show at every validation where a map takes the samples of the first validation batch.

    The figure goes to the loggers of W&B, TensorBoard, MLflow and CSV under ``lightning_gap/monge/map``: the target,
    and a line from each sample to its image, in the space the map works in; in more than two dimensions along the two
    directions of the target's largest variance, the same at each validation. It only observes.

    Args:
        points: At most this many samples are drawn, of a batch of several conditions in all.

    Raises:
        ValueError: ``points`` is not a positive integer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> trainer = Trainer(logger=CSVLogger("."), callbacks=[MapFigure()])  # doctest: +SKIP
        >>> trainer.fit(model, data)  # doctest: +SKIP
    """

    def __init__(self, *, points: int = 500) -> None:
        if isinstance(points, bool) or not isinstance(points, int) or points < 1:
            raise ValueError(f"points must be a positive integer, got {points!r}")
        self.points = points
        self._plane: NDArray[np.float64] | None = None
        self._shown: tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the directions of earlier data."""
        self._plane = self._shown = None

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Map the samples of the first batch."""
        if batch_idx or dataloader_idx or trainer.sanity_checking or not trainer.is_global_zero:
            return
        source, target, condition = batch[0], batch[1], getattr(batch, "condition", None)
        if source.dim() == 2:
            source, target = source[None], target[None]
        each = -(-self.points // len(source))
        source, target = source[:, :each], target[:, :each]
        dtype = next((p.dtype for p in pl_module.parameters() if p.is_floating_point()), source.dtype)
        images = [
            pl_module(x.to(dtype)) if condition is None else pl_module(x.to(dtype), label.expand(len(x), *label.shape))
            for x, label in zip(source, source if condition is None else condition, strict=True)
        ]
        self._shown = tuple(_array(x) for x in (source, torch.stack(images), target))  # type: ignore[assignment]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw them."""
        shown, self._shown = self._shown, None
        if shown is None:
            return
        source, mapped, target = shown
        if self._plane is None and source.shape[1] > 2:
            self._plane = principal_plane(target)

        def draw() -> Any:
            from matplotlib.figure import Figure

            figure = Figure(figsize=(6, 5), layout="constrained")
            ax = plot_map(source, mapped, target, plane=self._plane, ax=figure.add_subplot())
            ax.set_title(f"after {trainer.global_step} updates", loc="right", fontsize=10)
            return figure

        log_figure(trainer.loggers, "lightning_gap/monge/map", draw, trainer.global_step)


def _array(x: Tensor) -> NDArray[Any]:
    return x.flatten(0, -2).double().cpu().numpy()
