"""What metrics of samples share: batches of weighted samples that are pooled, and pictures of their values."""

from typing import Any, ClassVar

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_gap.extras import library
from lightning_gap.monge.ot.checks import check_pair, check_weights, solver_precision
from lightning_gap.monge.ot.costs import Cost
from lightning_gap.precision import widest
from lightning_gap.trainer.internals.of_lightning import plot_metric

__all__ = ["DrawnMetric", "SampleMetric", "TwoSampleMetric", "pooled", "pooling_weights"]


def pooling_weights(name: str, weights: Tensor | None, samples: Tensor, part_of: int | None = None) -> Tensor:
    """Return weights of ``(n, d)`` samples of mean 1, so that a batch counts by its samples, but those of weight 0.

    Given ones sum to 1, over all parts where these are one process's part of a batch of size ``part_of``.
    """
    if weights is None:
        return samples.new_ones(len(samples), dtype=widest(samples.device))
    given = weights.detach() if isinstance(weights, Tensor) else weights
    weights = check_weights(name, given, solver_precision(samples), balanced=part_of is None)
    return weights.to(widest(samples.device)) * ((weights > 0).sum() if part_of is None else part_of)


def pooled(weights: Tensor, like: Tensor) -> Tensor | None:
    """Return the weights of pooled batches, summing to 1; ``None`` where they are uniform."""
    if bool((weights == weights[0]).all()):
        return None
    return (weights / weights.sum()).to(solver_precision(like))


class DrawnMetric(Metric):
    """A metric that draws itself."""

    full_state_update: bool = False

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw a value, or one for each step, on Matplotlib axes; by default that of ``compute()``, on new ones."""
        library("matplotlib", f"{type(self).__name__}.plot()", "plots")
        return plot_metric(self, val, ax)


class SampleMetric(DrawnMetric):
    """A metric of two sets of samples, all of which it keeps."""

    is_differentiable: bool = False
    higher_is_better: bool = False
    # Names of the two sets, and of the states that keep them.
    sets: ClassVar[tuple[str, str]] = ("x", "y")
    # Those of their weights: one for both sets where they are paired.
    masses: ClassVar[tuple[str, ...]] = ("x_weights", "y_weights")
    paired: ClassVar[bool] = False
    # Whose domain the samples are in; none where all are.
    cost: Cost | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in (*self.sets, *self.masses):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def keep(self, first: Tensor, second: Tensor, *weights: Tensor | None) -> None:
        """Check both sets and keep them."""
        given = dict(zip(self.sets, (first, second), strict=True))
        check_pair(self.sets[0], first, self.sets[1], second, same_length=self.paired)
        for name, samples in given.items():
            if self.cost is not None:
                self.cost.check_domain(name, samples)
            kept = getattr(self, name)
            if kept and kept[0].shape[1] != samples.shape[1]:
                raise ValueError(
                    f"{name} has dimension {samples.shape[1]}, but {kept[0].shape[1]} in earlier updates: "
                    "use one metric for each space, or reset() between them"
                )
        names = ["weights"] if len(weights) == 1 else ["weights[0]", "weights[1]"]
        masses = [pooling_weights(*one) for one in zip(names, weights, (first, second), strict=False)]
        # Without their graphs, or an epoch of them would stay in memory.
        for name, new in (*given.items(), *zip(self.masses, masses, strict=True)):
            getattr(self, name).append(new.detach())

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return all samples of both sets."""
        first, second = (dim_zero_cat(getattr(self, name)) for name in self.sets)
        return first, second

    def kept_weights(self) -> list[Tensor | None]:
        """Return their weights, summing to 1; ``None`` for uniform ones."""
        samples = dim_zero_cat(getattr(self, self.sets[0]))
        return [pooled(dim_zero_cat(getattr(self, name)), samples) for name in self.masses]


class TwoSampleMetric(SampleMetric):
    """A distance between two sets of samples that are not paired."""

    plot_lower_bound: float = 0.0
    x: list[Tensor]
    y: list[Tensor]
    x_weights: list[Tensor]
    y_weights: list[Tensor]

    def update(self, x: Tensor, y: Tensor, *, weights: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:
        """Add samples, which are not paired.

        Args:
            x: ``(n, d)`` samples.
            y: ``(m, d)`` samples.
            weights: Of both, each summing to 1; uniform by default. Batches count by their numbers of samples.
        """
        self.keep(x, y, *weights)
