"""What every hyperparameter of a parameter group becomes at another batch: learning rate, weight decay and memories."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_gap.regime.rules.base import MOMENT_KEYS
from lightning_gap.regime.rules.factor import RULES, LRRule, lr_factor, rule_name
from lightning_gap.regime.rules.memory import check_remembered, ema_momentum, remembered
from lightning_gap.regime.rules.optimizers import OptimizerKind, kind_of, names_of

__all__ = ["LR_KEYS", "BetasRule", "MomentumRule", "OptimizerRules", "Rescaling", "WeightDecayRule", "times"]

WeightDecayRule = Literal["none", "timescale"] | Callable[[float], float]
BetasRule = Literal["none", "half_life", "sde"] | Callable[[str, float, float], float]
MomentumRule = Literal["none", "half_life"]

# Where an optimizer's group keeps learning rates: its own, and those its scheduler left there.
LR_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# The ends between which a scheduler moves a momentum, or the first of Adam's betas.
_ENDS = ("max_momentum", "base_momentum")


@dataclass(frozen=True)
class OptimizerRules:
    r"""What the hyperparameters of an optimizer become when the batch grows by :math:`\kappa`.

    Of one update of this run, p updates of the reference run pass: :math:`p = \kappa` at equal samples, 1 at equal
    updates. With the factor f of the learning rate, :math:`\eta' = f \eta`:

    .. math:: \lambda' = \lambda \, p / f \ \text{("timescale")}, \qquad
        \beta_2' = \beta_2^{\,p} \ \text{("half_life")}, \qquad
        1 - \beta' = \kappa (1 - \beta), \ \epsilon' = \epsilon / \sqrt\kappa \ \text{("sde")}

    ``"timescale"`` keeps the share of the run over which AdamW averages, :math:`1 / (\eta \lambda)` updates; so under
    the square root :math:`\lambda' = \sqrt\kappa \lambda` at equal samples and :math:`\lambda / \sqrt\kappa` at equal
    updates. It is for decay that is decoupled from the gradient. Decay that is part of the gradient (``SGD``, ``Adam``
    as it is) stays: it is a term of the loss, which the learning rate multiplies as it does the rest, and another
    number would be another loss. ``"half_life"`` is for second moments, defined at every ratio; first moments stay.

    What a rule must know of an optimizer is one line of :data:`OPTIMIZERS`, which you can extend.

    Args:
        lr: The rule of the learning rate, a name or a function from the ratio to the factor.
        weight_decay: ``"none"``, ``"timescale"``, or a function from the ratio to the factor of weight decay.
        betas: ``"none"``, ``"half_life"``, ``"sde"``, or a function of a name (``"beta1"``, ``"beta2"``, ``"alpha"``,
            ``"momentum"``), its value and the ratio, that returns the new value. Default: ``"sde"`` with the learning
            rate's ``"adam"``, else ``"none"``.
        momentum: ``"half_life"``: momentum of SGD and Muon, too, remembers as many samples, :math:`\mu^p`; where it
            sums gradients the learning rate is multiplied by :math:`(1 - \mu') / (1 - \mu)`, so that what a gradient
            moves in all, :math:`\eta / (1 - \mu)`, follows the rule of the learning rate.

    Raises:
        ValueError: If a rule is not known.

    References:
        Wang and Aitchison 2024, "How to set AdamW's weight decay as you scale model and dataset size"; Bergsma et al.
        2025, "Power Lines" (the time scale). Marek et al. 2025, "Small Batch Size Training for Language Models" (the
        half-life). Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms".

    Example:
        >>> rules = OptimizerRules("sqrt", weight_decay="timescale", betas="half_life")
        >>> group = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
        >>> new = rules.at("AdamW", group, 16, equal_samples=True)
        >>> new["lr"], new["weight_decay"], [round(beta, 6) for beta in new["betas"]]
        (0.004, 0.4, [0.9, 0.984119])
        >>> rules.at("AdamW", group, 16, equal_samples=False)
        {'lr': 0.004, 'weight_decay': 0.025}
    """

    lr: LRRule = "sqrt"
    weight_decay: WeightDecayRule = "none"
    betas: BetasRule | None = None
    momentum: MomentumRule = "none"

    def __post_init__(self) -> None:
        if isinstance(self.lr, str) and self.lr not in RULES:
            lr_factor(self.lr, 1.0)  # raises, naming the rules there are
        for name, rule, known in (
            ("weight_decay", self.weight_decay, ("none", "timescale")),
            ("betas", self.betas or "none", ("none", "half_life", "sde")),
        ):
            if not callable(rule) and rule not in known:
                raise ValueError(
                    f"the rule of {name}, {rule!r}, is not known; pass one of {list(known)} or a callable."
                )
        if self.momentum not in ("none", "half_life"):
            raise ValueError(f"the rule of momentum, {self.momentum!r}, is not known; pass 'none' or 'half_life'.")
        if self.momentum != "none" and callable(self.betas):
            raise ValueError("a function of betas decides momentum too: pass momentum='none' with it.")

    @property
    def betas_rule(self) -> BetasRule:
        """The rule of the betas, where none was given too."""
        if self.betas is not None:
            return self.betas
        return "sde" if isinstance(self.lr, str) and RULES[self.lr].moments else "none"

    def rescaling(self, ratio: float, pace: float, *, factor: float | None = None) -> "Rescaling":
        """Return what to do at a ratio, and a pace.

        Args:
            ratio: The batch that runs over the reference batch, larger than 0.
            pace: How many updates of the reference run pass in one of this run.
            factor: What the learning rate is multiplied by. Default: what its rule says.
        """
        for name, value in (("ratio", ratio), ("pace", pace)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite: this run's over the reference run's.")
        decay = self.weight_decay(ratio) if callable(self.weight_decay) else 1.0
        if not 0 <= decay < math.inf:
            raise ValueError(f"weight_decay gave the factor {decay!r} for the ratio {ratio:g}, and not 0 or more.")
        return Rescaling(
            lr_factor=lr_factor(self.lr, ratio) if factor is None else factor,
            ratio=ratio,
            pace=pace,
            decay=decay,
            timescale=self.weight_decay == "timescale",
            betas=self.betas_rule,
            momentum=self.momentum,
        )

    def at(
        self, optimizer: Any, group: Mapping[str, Any], ratio: float, *, equal_samples: bool, pace: float | None = None
    ) -> dict[str, Any]:
        """Return the new values of those hyperparameters of a group that change, and of no others.

        Args:
            optimizer: The name of the optimizer's class, the class, or the names of its ``__mro__``.
            group: The reference run's parameter group, which stays as it is; its ``defaults`` are one too.
            ratio: The batch that runs over the reference batch, larger than 0.
            equal_samples: Whether the run sees the reference run's samples, or makes its updates.
            pace: For a run between the two: how many updates of the reference run pass in one of this run.

        Returns:
            Values by the group's keys, of the types that they have there.

        Raises:
            ValueError: If the ratio is not positive, if a rule needs to know an optimizer that is not in
                :data:`OPTIMIZERS`, if ``"sde"`` would forget too much, or if a function returns what cannot be.
        """
        pace = (ratio if equal_samples else 1.0) if pace is None else pace
        return self.rescaling(ratio, pace).at(optimizer, group)


@dataclass(frozen=True)
class Rescaling:
    """What changes hyperparameters: rules, where the ratio is known, so that there are factors.

    Args:
        lr_factor: What the learning rate is multiplied by.
        ratio: This run's batch over the reference batch.
        pace: How many updates of the reference run pass in one of this run.
        decay: What weight decay of any kind is multiplied by, beside its time scale.
        timescale: Whether decay that is beside the gradient keeps its time scale.
        betas: The rule of the betas.
        momentum: The rule of momentum.
    """

    lr_factor: float = 1.0
    ratio: float = 1.0
    pace: float = 1.0
    decay: float = 1.0
    timescale: bool = False
    betas: BetasRule = "none"
    momentum: MomentumRule = "none"

    @property
    def changes(self) -> bool:
        """Whether there is anything that it may change."""
        decays = self.decay != 1.0 or (self.timescale and self.pace != self.lr_factor)
        remembers = self.pace if "half_life" in (self.betas, self.momentum) else 1.0
        remembers *= self.ratio if self.betas == "sde" else 1.0
        return self.lr_factor != 1.0 or decays or remembers != 1.0 or callable(self.betas)

    def after(self, before: "Rescaling") -> "Rescaling":
        """Return what leads here from hyperparameters that have been changed already.

        Args:
            before: What has changed them, by the same rules at another ratio.
        """
        if callable(self.betas) and self.ratio != before.ratio:
            raise ValueError(
                "a function of betas cannot go on from another batch, for it is told the reference run's: use a rule "
                "by its name, or the batch of the checkpoint."
            )
        return replace(
            self,
            lr_factor=self.lr_factor / before.lr_factor,
            ratio=self.ratio / before.ratio,
            pace=self.pace / before.pace,
            decay=self.decay / before.decay if before.decay else self.decay,
            betas="none" if callable(self.betas) else self.betas,
        )

    def at(self, optimizer: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        """Return the new values of those hyperparameters of a group that change, as :meth:`OptimizerRules.at` does.

        Args:
            optimizer: The optimizer, its class, or its name.
            group: A parameter group, which stays as it is.
        """
        factor, new = self.rate_factor(optimizer, group), {}
        if self.momentum == "half_life" and group.get("momentum"):
            new["momentum"] = ema_momentum(group["momentum"], self.pace)
        if factor != 1.0:
            new |= {key: times(group[key], factor) for key in LR_KEYS if group.get(key) is not None}
        if group.get("weight_decay"):
            decay = self.decay
            if self.timescale and _known(optimizer, "weight_decay='timescale'").decouples(group):
                decay *= self.pace / factor
            if decay != 1.0:
                new["weight_decay"] = times(group["weight_decay"], decay)
        new |= self._memories(optimizer, group)
        return {key: value for key, value in new.items() if type(value) is not type(group[key]) or value != group[key]}

    def rate_factor(self, optimizer: Any, group: Mapping[str, Any]) -> float:
        r"""Return what the learning rates of a group are multiplied by.

        That is the rule's factor, and :math:`(1 - \mu') / (1 - \mu)` where momentum sums gradients and follows too.

        Args:
            optimizer: The optimizer, its class, or its name.
            group: A parameter group.
        """
        momentum = group.get("momentum")
        if self.momentum == "none" or not momentum or momentum == 1:
            return self.lr_factor
        if not _known(optimizer, f"momentum={self.momentum!r}").heavy_ball:
            return self.lr_factor
        return self.lr_factor * float((1 - ema_momentum(momentum, self.pace)) / (1 - momentum))

    def end(self, optimizer: Any, value: Any) -> Any:
        """Return what becomes of an end between which a scheduler moves a momentum, or the first of the betas.

        Args:
            optimizer: The optimizer that it schedules.
            value: The end, or a list of ends.
        """
        if isinstance(value, (list, tuple)):
            return type(value)(self.end(optimizer, each) for each in value)
        if self.betas == "sde" and self.ratio != 1.0:
            return remembered(value, self.ratio)
        if callable(self.betas):
            return _told(self.betas, self.ratio)(_first(_known(optimizer, f"betas={rule_name(self.betas)}")), value)
        return value

    def _memories(self, optimizer: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        rule = self.betas
        if rule == "none" or not any(group.get(key) for key in (*MOMENT_KEYS, "momentum")):
            return {}
        if rule == "sde":
            return _by_sde(group, self.ratio) if self.ratio != 1.0 else {}
        kind = _known(optimizer, f"betas={rule_name(rule)}")
        if not callable(rule):
            return _replaced(group, kind.second_moments, lambda _, beta: ema_momentum(beta, self.pace))
        told = _told(rule, self.ratio)
        memories = (*kind.moments, *kind.second_moments, *((("momentum", None),) if kind.heavy_ball else ()))
        ends = {key: told(_first(kind), group[key]) for key in _ENDS if key in group}
        return _replaced(group, dict.fromkeys(memories), told) | ends


def _known(optimizer: Any, rule: str) -> OptimizerKind:
    kind = kind_of(optimizer)
    if kind is None:
        name = names_of(optimizer)[0]
        raise ValueError(
            f"{rule} must know how {name} uses its hyperparameters. Add a line to lightning_gap.regime.OPTIMIZERS: "
            f'OPTIMIZERS["{name}"] = OptimizerKind(...); or pass "none".'
        )
    return kind


def _first(kind: OptimizerKind) -> str:
    return "beta1" if ("betas", 0) in kind.moments else "momentum"


def _told(rule: Callable[[str, float, float], float], ratio: float) -> Callable[[str, Any], Any]:
    def change(name: str, beta: Any) -> Any:
        value = rule(name, beta, ratio)
        if not 0 <= value < 1:
            raise ValueError(f"betas gave {value!r} for {name}={beta} at the ratio {ratio:g}: from 0 to below 1.")
        return value

    return change


def times(value: Any, factor: float) -> Any:
    """Return ``factor`` times a number, a tensor (a new one), ``None``, or a list of these."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [times(item, factor) for item in value]
    return (value.detach() if hasattr(value, "detach") else value) * factor


def _by_sde(group: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    new = {}
    for key in MOMENT_KEYS:
        if key in group:
            check_remembered(key, group[key], ratio, 'betas="sde"')
            new[key] = remembered(group[key], ratio)
    if new and "eps" in group:
        new["eps"] = group["eps"] / math.sqrt(ratio)
    return new


def _replaced(group: Mapping[str, Any], memories: Any, change: Callable[[str, Any], Any]) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for key, index in memories:
        if key not in group:
            continue
        if index is None:
            new[key] = change(key, group[key])
            continue
        values = list(new.get(key, group[key]))
        values[index] = change(f"{key.removesuffix('s')}{index + 1}", values[index])
        new[key] = type(group[key])(values)
    return new
