"""A plan from lengths that are given, with or without a Trainer."""

import math

from lightning_gap.regime.clock import share_of, updates_in_epoch
from lightning_gap.regime.plan import RegimePlan
from lightning_gap.regime.rules.auto import AUTO, rules_for
from lightning_gap.regime.rules.factor import LRRule, rule_name
from lightning_gap.regime.rules.factor import lr_factor as factor_of
from lightning_gap.regime.rules.hyperparameters import BetasRule, MomentumRule, WeightDecayRule
from lightning_gap.regime.scaling import default_train_longer

__all__ = ["plan_regime"]


def plan_regime(
    *,
    reference_batch_size: int,
    batch_size: int,
    lr_rule: LRRule = "sqrt",
    lr_factor: float | None = None,
    weight_decay_rule: WeightDecayRule | None = None,
    betas_rule: BetasRule | None = None,
    momentum_rule: MomentumRule = "none",
    reference_updates_per_epoch: int | None = None,
    updates_per_epoch: int | None = None,
    samples: int | None = None,
    drop_last: bool = False,
    max_epochs: int | None = None,
    max_steps: int | None = None,
    min_epochs: int = 0,
    train_longer: float | None = None,
) -> RegimePlan:
    r"""Plan a run at one batch size that makes as many updates as the reference run at another, or a part of them.

    With :math:`U_S = \lceil N/|B_S| \rceil` updates in a reference epoch and :math:`U_L` in one of this run, a
    reference epoch takes :math:`U = U_L + \lambda (U_S - U_L)` updates, where :math:`\lambda` is ``train_longer``. The
    reference run's E epochs are :math:`\lceil E U \rceil` updates, in :math:`\lceil E U / U_L \rceil` epochs of this
    run; the last one may be cut short. So :math:`\lambda = 1` makes exactly the reference run's updates, and
    :math:`\lambda = 0` its epochs. Multiplying the epochs by the ratio of the batches, as the paper writes it, is not
    exact.

    Args:
        reference_batch_size: Samples per update of the reference run, :math:`|B_S|`.
        batch_size: Samples per update of this run, :math:`|B_L|`; it may be the smaller one too.
        lr_rule: The learning-rate rule, see :func:`lr_factor`, or ``"auto"``, which :meth:`RegimePlan.apply` decides.
        weight_decay_rule: The rule of weight decay, see :class:`OptimizerRules`.
        betas_rule: The rule of the betas.
        momentum_rule: The rule of momentum.
        lr_factor: What every learning rate is multiplied by. Default: what the rule says.
        reference_updates_per_epoch: Updates in one epoch of the reference run, :math:`U_S`. Default: from ``samples``.
        updates_per_epoch: Updates in one epoch of this run, :math:`U_L`. Default: from ``samples``.
        samples: Samples in one pass over the data, N.
        drop_last: Whether an incomplete last batch is dropped.
        max_epochs: The reference run's epochs, E; ``None`` for no limit.
        max_steps: The reference run's limit of updates; ``None`` for no limit.
        min_epochs: The reference run's least number of epochs.
        train_longer: How far to go from the reference run's epochs to its updates, :math:`\lambda` in [0, 1].
            Default: 1, and 0 for the rules that are derived for equal samples, ``"linear"`` and ``"adam"``.

    Returns:
        The plan.

    Raises:
        ValueError: If an epoch of either run has no update, or its length is not given, or a batch is more than the
            samples that tell it.

    References:
        Hoffer, Hubara, Soudry 2017, "Train longer, generalize better", section 5 (regime adaptation).

    Example:
        >>> plan = plan_regime(reference_batch_size=128, batch_size=4096, samples=50_000, max_epochs=50)
        >>> plan.updates, plan.epochs, plan.stops_within_epoch, round(plan.lr_factor, 4)
        (19550, 1504, True, 5.6569)
    """
    told = updates_per_epoch is None
    sizes = (reference_batch_size, batch_size)
    if samples is not None:
        there, here = (updates_in_epoch(samples, size, drop_last=drop_last) for size in sizes)
        reference_updates_per_epoch = there if reference_updates_per_epoch is None else reference_updates_per_epoch
        updates_per_epoch = here if updates_per_epoch is None else updates_per_epoch
    if reference_updates_per_epoch is None or updates_per_epoch is None:
        raise ValueError("the length of an epoch is unknown: pass samples=, or both runs' updates per epoch.")
    if reference_updates_per_epoch < 1 or updates_per_epoch < 1:
        raise ValueError(
            f"an epoch has {reference_updates_per_epoch} updates at reference_batch_size={reference_batch_size} and "
            f"{updates_per_epoch} at the batch size {batch_size}: both must be at least 1. Use a smaller batch, or "
            "drop_last=False in the DataLoader."
        )
    if told and samples is not None and max(sizes) > samples:
        name = "reference_batch_size" if reference_batch_size > samples else "batch_size"
        raise ValueError(
            f"{name}={max(sizes)} is more than the {samples} samples of an epoch, so no update sees as many. Use "
            f"{samples} or less."
        )
    limits = [] if max_epochs is None else [max_epochs * reference_updates_per_epoch]
    limits += [] if max_steps is None else [max_steps]
    reference_updates = min(limits, default=None)
    rules, auto = rules_for(lr_rule, weight_decay_rule, betas_rule, momentum_rule), lr_rule == AUTO
    if lr_factor is None:
        lr_factor = 1.0 if auto else factor_of(lr_rule, batch_size / reference_batch_size)
    train_longer = default_train_longer(lr_rule) if train_longer is None else float(train_longer)
    epoch = updates_per_epoch + share_of(train_longer) * (reference_updates_per_epoch - updates_per_epoch)
    share = epoch / reference_updates_per_epoch
    updates = None if reference_updates is None else math.ceil(reference_updates * share)

    return RegimePlan(
        reference_batch_size=reference_batch_size,
        batch_size=batch_size,
        lr_rule=rule_name(lr_rule),
        lr_factor=lr_factor,
        weight_decay_rule=rule_name(rules.weight_decay),
        betas_rule=rule_name(rules.betas_rule),
        momentum_rule=rules.momentum,
        rules=rules,
        train_longer=train_longer,
        reference_updates_per_epoch=reference_updates_per_epoch,
        updates_per_epoch=updates_per_epoch,
        samples=samples,
        drop_last=drop_last,
        reference_epochs=max_epochs,
        epochs=None if max_epochs is None or updates is None else math.ceil(updates / updates_per_epoch),
        min_epochs=math.floor(min_epochs * epoch / updates_per_epoch),
        reference_updates=reference_updates,
        updates=updates,
    )
