"""The rule that chooses: what to do with the learning rate, by ratio, length and optimizer, and why, in one line."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning_gap.regime.rules.hyperparameters import BetasRule, MomentumRule, OptimizerRules, WeightDecayRule
from lightning_gap.regime.rules.optimizers import kind_of, names_of

__all__ = ["AUTO", "WARMUP_SHARE", "Choice", "choose", "gain", "rules_for"]

AUTO = "auto"
# Of the run's updates; with as many, the square root lost nothing against the rate as it was, and without it much.
WARMUP_SHARE = 0.1


class Choice(NamedTuple):
    """A factor of the learning rate, the updates in which it is reached, and why."""

    factor: float
    warmup_updates: int
    why: str


def gain(ratio: float, batch_size: float, noise_scale: float) -> float:
    r"""Return how many times fewer updates a batch needs than the reference batch, at the same noise scale.

    .. math:: g = \frac{1 + B_c / |B_S|}{1 + B_c / |B_L|}

    McCandlish et al. 2018, section 2: the ratio of the batches while both are far below the noise scale, and 1 far
    above it.

    Example:
        >>> round(gain(8, 512, 1e6), 2), round(gain(8, 512, 64), 2)
        (8.0, 1.78)
    """
    return (1 + noise_scale * ratio / batch_size) / (1 + noise_scale / batch_size)


def choose(
    optimizers: Iterable[Any],
    *,
    ratio: float,
    batch_size: int,
    train_longer: float,
    updates: int | None,
    noise_scale: float | None = None,
) -> Choice:
    r"""Choose what ``lr_rule="auto"`` does.

    The learning rate is multiplied by :math:`\sqrt\kappa`, or where the noise scale is known by :math:`\sqrt g` (see
    :func:`gain`), and warmed up over a tenth of the run. It stays as it is for Adam and its kin at equal updates, where
    no rule is derived for them; for optimizers that have no square-root rule; and where nothing tells how long the run
    is, so how long to warm up. A smaller batch needs no warm-up.

    Args:
        optimizers: The optimizers, or their classes or names.
        ratio: :math:`\kappa`, the batch that runs over the reference batch.
        batch_size: The batch that runs, :math:`|B_L|`.
        train_longer: From 0, equal samples, to 1, equal updates.
        updates: The updates of the run; ``None`` where nothing limits them.
        noise_scale: The noise scale :math:`B_c` in samples, where it is known.

    Returns:
        The factor, the updates of the warm-up, and the reason.

    Example:
        >>> choose(["SGD"], ratio=32, batch_size=4096, train_longer=0, updates=750).why
        'sqrt, with a warm-up over 10 % of the updates'
        >>> choose(["AdamW"], ratio=32, batch_size=4096, train_longer=1, updates=23450).why
        'as it is: for AdamW at equal updates no rule is derived'
    """
    for optimizer in optimizers:
        kind, name = kind_of(optimizer), names_of(optimizer)[0]
        if kind is None or not (kind.adaptive or "sqrt" in kind.lr_rules):
            return Choice(1.0, 0, f"as it is: {name} has no square-root rule")
        if kind.adaptive and train_longer == 1:
            return Choice(1.0, 0, f"as it is: for {name} at equal updates no rule is derived")
    told, counted = "sqrt", ratio
    if noise_scale is not None:
        counted = gain(ratio, batch_size, noise_scale)
        told = f"sqrt of {counted:.3g}, the updates that a noise scale of {noise_scale:g} saves"
    if ratio <= 1:
        return Choice(math.sqrt(counted), 0, f"{told}; a smaller batch needs no warm-up" if ratio < 1 else "one batch")
    if updates is None:
        return Choice(1.0, 0, "as it is: the run has no length, of which a warm-up would be a share")
    why = f"{told}, with a warm-up over {100 * WARMUP_SHARE:g} % of the updates"
    return Choice(math.sqrt(counted), math.ceil(WARMUP_SHARE * updates), why)


def rules_for(
    lr: Any, weight_decay: WeightDecayRule | None, betas: BetasRule | None, momentum: MomentumRule = "none"
) -> OptimizerRules:
    """Return the rules of a run; those that are not given are ``"none"``, and with ``"auto"`` whatever lr needs.

    Args:
        lr: The rule of the learning rate, ``"auto"`` too.
        weight_decay: The rule of weight decay, or ``None``.
        betas: The rule of the betas, or ``None``.
        momentum: The rule of momentum.
    """
    if lr == AUTO:
        return OptimizerRules("none", weight_decay or "timescale", betas or "half_life", momentum)
    return OptimizerRules(lr, weight_decay or "none", betas, momentum)
