"""In which norm each parameter's gradient counts, and how much: what its optimizer does to it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_gap.regime.rules.optimizers import GradientNorm, kind_of, names_of

__all__ = ["MeasuredParameter", "NoiseNorm", "common_norm", "parameter_norms"]

NoiseNorm = Literal["euclidean", "l1", "nuclear", "auto"]

_NAME = 'pass norm="euclidean", "l1" or "nuclear"'


@dataclass(frozen=True, eq=False)
class MeasuredParameter:
    """A parameter, the norm of its gradient, and the group of its optimizer where the step's length counts."""

    parameter: Tensor
    norm: GradientNorm
    group: Mapping[str, Any] | None = None

    @property
    def weight(self) -> float:
        """The length of a step in the norm whose dual counts: the learning rate, times Muon's factor of the shape."""
        if self.group is None:
            return 1.0
        return float(self.group["lr"]) * (_muon_factor(self.group, self.parameter) if self.norm == "nuclear" else 1.0)


def parameter_norms(optimizers: Iterable[Optimizer], norm: NoiseNorm) -> list[MeasuredParameter]:
    r"""Return each parameter that is trained with its norm.

    With ``"auto"`` a group's norm is its ``"gradient_norm"`` if it names one; else that of ``"use_muon"``, by which
    optimizers of both kinds tell theirs; else the ``norm`` of its optimizer in :data:`OPTIMIZERS`. An update of groups
    with learning rates :math:`\eta_k` is one of steepest descent in :math:`\max_k \|s_k\| / \eta_k`, whose dual is
    :math:`\sum_k \eta_k \|G_k\|_*`: so noise and gradients are added with these weights.

    Args:
        optimizers: Of the run.
        norm: As asked for; another than ``"auto"`` holds for all, with equal weights.

    Raises:
        ValueError: If an optimizer's norm is not known, or some have the Euclidean one beside others.

    Example:
        >>> import torch
        >>> weight, bias = torch.nn.Linear(4, 3).parameters()
        >>> muon, adamw = torch.optim.Muon([weight], lr=0.02), torch.optim.AdamW([bias], lr=1e-3)
        >>> [(each.norm, each.weight) for each in parameter_norms([muon, adamw], "auto")]
        [('nuclear', 0.02), ('l1', 0.001)]
    """
    found = [
        MeasuredParameter(parameter, _norm_of(optimizer, group), group)
        if norm == "auto"
        else MeasuredParameter(parameter, norm)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
    if len(norms := {each.norm for each in found}) > 1 and "euclidean" in norms:
        raise ValueError(
            "norm='auto': the length of a step follows the gradient's in one group, as with SGD, and not in another, "
            f"so that no norm belongs to both: {_NAME}"
        )
    return found


def common_norm(measured: Sequence[MeasuredParameter]) -> str:
    """Return what to call the norm of all: its name, or both names.

    Example:
        >>> import torch
        >>> common_norm(parameter_norms([torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())], "auto"))
        'l1'
    """
    return " and ".join(sorted({each.norm for each in measured}, reverse=True)) or "euclidean"


def _norm_of(optimizer: Optimizer, group: Mapping[str, Any]) -> GradientNorm:
    named = group.get("gradient_norm")
    if named in ("euclidean", "l1", "nuclear"):
        return named  # type: ignore[no-any-return]
    if named is not None:
        raise ValueError(f"the \"gradient_norm\" of a group must be 'euclidean', 'l1' or 'nuclear', got {named!r}")
    if "use_muon" in group:
        return "nuclear" if group["use_muon"] else "l1"
    kind = kind_of(optimizer)
    if kind is None or kind.norm is None:
        name = names_of(optimizer)[0]
        raise ValueError(
            f"norm='auto': the norm in which {name} descends is not known: {_NAME}, give its groups a "
            f'"gradient_norm", or add a line to lightning_gap.regime.OPTIMIZERS: OPTIMIZERS["{name}"] = '
            "OptimizerKind(..., norm=...)"
        )
    return kind.norm


def _muon_factor(group: Mapping[str, Any], parameter: Tensor) -> float:
    if parameter.dim() < 2:
        return 1.0
    rows, columns = parameter.shape[0], parameter[0].numel()
    adjusted = group.get("adjust_lr_fn") or "original"
    if adjusted == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns)) if adjusted == "match_rms_adamw" else 1.0
