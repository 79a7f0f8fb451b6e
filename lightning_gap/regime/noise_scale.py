"""The gradient noise scale: how large a batch may be before it stops paying."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

__all__ = [
    "NoiseScaleEstimate",
    "batch_verdict",
    "gradient_moments",
    "normalization_note",
    "plan_verdict",
    "unmeasured_note",
]


def gradient_moments(
    small_square: float, big_square: float, small_batch: float, big_batch: float
) -> tuple[float, float]:
    r"""Return unbiased estimates of :math:`\operatorname{tr} \Sigma` and :math:`|G|^2` from two batch sizes.

    A mean gradient over B samples has :math:`E|G_B|^2 = |G|^2 + \operatorname{tr}\Sigma / B`. Two batch sizes give two
    equations:

    .. math:: \operatorname{tr}\Sigma \approx \frac{|G_s|^2 - |G_b|^2}{1/B_s - 1/B_b}, \qquad
        |G|^2 \approx \frac{B_b |G_b|^2 - B_s |G_s|^2}{B_b - B_s}.

    Args:
        small_square: :math:`|G_s|^2`, the squared norm of the small batches' gradients, averaged over these.
        big_square: :math:`|G_b|^2`, the squared norm of the big batch's gradient.
        small_batch: :math:`B_s`.
        big_batch: :math:`B_b`, more than :math:`B_s`.

    Returns:
        The variance of a sample's gradient, :math:`\operatorname{tr}\Sigma`, and :math:`|G|^2`. Either may come out
        negative; average many before you divide.

    References:
        McCandlish, Kaplan, Amodei 2018, "An empirical model of large-batch training", appendix A.1.

    Example:
        >>> gradient_moments(3.0, 1.5, 8, 32)  # |G|^2 = 1 and tr(Sigma) = 16
        (16.0, 1.0)
    """
    variance = (small_square - big_square) / (1 / small_batch - 1 / big_batch)
    square = (big_batch * big_square - small_batch * small_square) / (big_batch - small_batch)
    return variance, square


@dataclass
class NoiseScaleEstimate:
    r"""Averages of :math:`\operatorname{tr}\Sigma` and :math:`|G|^2`, each by itself, and their ratio.

    A mean of ratios would be dominated by the measurements where :math:`|G|^2` happens to be near 0.

    Args:
        decay: The weight that an average keeps from one measurement to the next, in [0, 1).

    Attributes:
        measurements: How many there were.

    Example:
        >>> estimate = NoiseScaleEstimate(decay=0.5)
        >>> estimate.update(16.0, 1.0)
        >>> estimate.update(8.0, 1.0)
        >>> estimate.critical_batch_size  # (16 + 8) / (1 + 1)
        12.0
        >>> round(estimate.noise_scale, 4)  # the latest weighs twice as much
        10.6667
    """

    norm: ClassVar[str] = "euclidean"

    decay: float
    measurements: int = 0
    variance: float = 0.0
    square: float = 0.0
    total_variance: float = 0.0
    total_square: float = 0.0

    def update(self, variance: float, square: float) -> None:
        r"""Take in one measurement, as :func:`gradient_moments` returns it; one that is not finite is left out.

        Args:
            variance: Of :math:`\operatorname{tr}\Sigma`.
            square: Of :math:`|G|^2`.
        """
        if not (math.isfinite(variance) and math.isfinite(square)):
            return  # an overflow in half precision
        self.measurements += 1
        self.variance += (1 - self.decay) * (variance - self.variance)
        self.square += (1 - self.decay) * (square - self.square)
        self.total_variance += variance
        self.total_square += square

    @property
    def noise_scale(self) -> float:
        r"""The present :math:`B_{simple} = \operatorname{tr}\Sigma / |G|^2`, of averages that forget, or NaN."""
        return _ratio(self.variance, self.square)

    @property
    def critical_batch_size(self) -> float:
        r""":math:`B_{simple}` over the whole run: the batch at which steps and samples cost twice their least."""
        return _ratio(self.total_variance, self.total_square)


def _ratio(variance: float, square: float) -> float:
    """Return variance / square; NaN where noise has made either negative."""
    return variance / square if variance >= 0 and square > 0 else float("nan")


def batch_verdict(batch_size: int, estimate: NoiseScaleEstimate) -> str:
    r"""Say what a batch costs beside the critical one, :math:`B_c`, by section 2 of McCandlish et al. 2018.

    Training at the batch B to a given loss takes :math:`1 + B_c / B` times the fewest updates, and :math:`1 + B / B_c`
    times the fewest samples.

    Example:
        >>> estimate = NoiseScaleEstimate(decay=0.9)
        >>> estimate.update(1000.0, 1.0)
        >>> batch_verdict(4000, estimate).partition(",")[0]
        "critical batch about 1000; this run's 4000 is past it"
    """
    critical = estimate.critical_batch_size
    if not critical > 0:
        return (
            f"not known after {estimate.measurements} measurements; train longer, or measure at more updates "
            "(every_n_updates=1)."
        )
    side = "past it" if batch_size > critical else "not past it"
    updates, samples = 1 + critical / batch_size, 1 + batch_size / critical
    return (
        f"critical batch about {critical:.0f}; this run's {batch_size} is {side}, at {updates:.2g} times the fewest "
        f"updates and {samples:.2g} times the fewest samples."
    )


def plan_verdict(
    batch_size: int, reference_batch_size: int, estimate: NoiseScaleEstimate, *, planned: float | None = None
) -> str:
    r"""Say what the noise scale makes of a plan for another batch than the reference run's.

    To the same training loss the batch B takes :math:`(1 + B_c / B) / (1 + B_c / B_S)` times the updates of
    :math:`B_S`. It says nothing of generalization, for which Hoffer et al. train as many updates.
    """
    critical = estimate.critical_batch_size
    if not critical > 0:
        return ""
    updates = (1 + critical / batch_size) / (1 + critical / reference_batch_size)
    plan = "" if planned is None else f"; the plan makes {planned:.2g} times its updates"
    return (
        f"To the reference run's training loss this batch needs {updates:.2g} times its updates, "
        f"{updates * batch_size / reference_batch_size:.2g} times its samples{plan}."
    )


def normalization_note(layers: Mapping[str, nn.Module], micro_batch: int, replicas: int = 1) -> str:
    """Say what the noise scale means where layers normalize over the batch.

    A micro-batch's gradient is then one sample of its own, so averages over more of them obey the same two equations,
    with the variance of a sample's gradient replaced by the samples of a group times the variance of a group's.
    """
    if not layers:
        return ""
    more = f" and {len(layers) - 1} more normalize" if len(layers) > 1 else " normalizes"
    over = sorted({min(getattr(layer, "ghost_batch_size", micro_batch), micro_batch) for layer in layers.values()})
    if replicas > 1 and any(_spans_ranks(layer) for layer in layers.values()):
        return (
            f"{next(iter(layers))}{more} over samples of several replicas, whose gradients are not independent then: "
            "the noise scale is not that of the data, and may be far off."
        )
    return (
        f"{next(iter(layers))}{more} over {' or '.join(map(str, over))} samples, so the noise scale is that of batches "
        "made of such groups, and another number for groups of another size."
    )


def unmeasured_note(reasons: Mapping[str, str], model: nn.Module) -> str:
    """Say which parameters the noise scale leaves out, and how much of the weights they are.

    Example:
        >>> model = nn.ModuleDict({"places": nn.Embedding(4, 2), "head": nn.Linear(8, 3)})
        >>> unmeasured_note({"places.weight": "it is given positions"}, model)
        'the noise scale is that of 77.1 % of the weights, without places.weight (it is given positions).'
    """
    if not reasons:
        return ""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    left = sum(sizes.get(name, 0) for name in reasons)
    share = 100 * (1 - left / max(1, sum(sizes.values())))
    named = ", ".join(f"{name} ({reason})" for name, reason in list(reasons.items())[:3])
    more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return f"the noise scale is that of {share:.3g} % of the weights, without {named}{more}."


def _spans_ranks(layer: nn.Module) -> bool:
    return isinstance(layer, nn.SyncBatchNorm) or getattr(layer, "process_group", None) is not None
