"""How long averages remember at another batch: in samples as before, or by the rule of Adam's limiting SDE."""

from typing import Any

__all__ = ["MOST_FORGOTTEN", "batchnorm_momentum", "check_remembered", "ema_momentum", "remembered"]

# Malladi et al. 2022 derive their rule for 1 - beta small after it is scaled.
MOST_FORGOTTEN = 0.5


def ema_momentum(momentum: Any, ratio: float) -> Any:
    r"""Return the momentum with which an average over updates of a larger batch remembers as many samples.

    .. math:: \rho' = \rho^\kappa

    For the average of the weights (a teacher, BYOL's target, ``EMAWeightAveraging``) at equal samples, where
    :math:`\kappa` updates of the reference run pass in one; at equal updates it stays. Adam's second moment keeps its
    half-life in samples by the same formula, at every ratio.

    Args:
        momentum: :math:`\rho`, the weight of the past in one update, from 0 to 1; a number or a tensor.
        ratio: :math:`\kappa`, how many updates of the reference run pass in one.

    Returns:
        :math:`\rho'`.

    Raises:
        ValueError: If ``momentum`` is not from 0 to 1, or ``ratio`` not positive.

    References:
        Busbridge et al. 2023, "How to Scale Your EMA", definition 1.2. Marek et al. 2025, "Small Batch Size Training
        for Language Models" (the half-life of Adam's second moment).

    Example:
        >>> round(ema_momentum(0.996, 8), 6)
        0.968444
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum} must be from 0 to 1: the weight of the past in one update.")
    if not ratio > 0:
        raise ValueError(f"ratio={ratio} must be positive: the batch that runs over the reference batch.")
    return momentum**ratio


def batchnorm_momentum(momentum: float, ratio: float) -> float:
    r"""Return the ``momentum`` of BatchNorm with which running statistics are averages over as many samples.

    .. math:: m' = 1 - (1 - m)^\kappa

    torch's momentum is the weight of the newest batch, not of the past. For equal samples; at equal updates it stays.

    Args:
        momentum: :math:`m`, from 0 to 1.
        ratio: :math:`\kappa`, how many updates of the reference run pass in one.

    Returns:
        :math:`m'`.

    Raises:
        ValueError: If ``momentum`` is not from 0 to 1, or ``ratio`` not positive.

    References:
        Busbridge et al. 2023, "How to Scale Your EMA", definition 1.2: running statistics are such an average.

    Example:
        >>> round(batchnorm_momentum(0.1, 4), 4)
        0.3439
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum} must be from 0 to 1: the weight of the newest batch.")
    return 1 - float(ema_momentum(1 - momentum, ratio))


def remembered(beta: Any, ratio: float) -> Any:
    """Return 1 - ratio * (1 - beta), for a number, a tensor, or a tuple or list of these."""
    if isinstance(beta, (tuple, list)):
        return type(beta)(remembered(each, ratio) for each in beta)
    return 1 - ratio * (1 - beta)


def check_remembered(key: str, value: Any, ratio: float, rule: str = 'lr_rule="adam"') -> None:
    """Refuse one or several averages that would forget too much for Adam's rule to hold."""
    for beta in map(float, value if isinstance(value, (tuple, list)) else (value,)):
        if ratio * (1 - beta) >= MOST_FORGOTTEN:
            raise ValueError(
                f"{rule} at the ratio {ratio:g} would turn {key}={beta:g} into {1 - ratio * (1 - beta):.3g}; it holds "
                f'for ratio * (1 - beta) < {MOST_FORGOTTEN}. Use a smaller batch, or lr_rule="sqrt", which scales the '
                "learning rate alone."
            )
