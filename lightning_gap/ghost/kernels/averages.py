"""Running statistics after the updates by all ghosts of a batch, in the order of the ghosts."""

import math

import torch
from torch import Tensor

from lightning_gap.ghost.kernels.one_visit import average_natively

__all__ = ["average_in_place", "weights_of_ghosts"]


def weights_of_ghosts(ghosts: int, keep: float, like: Tensor) -> Tensor:
    """Return the weight of each ghost's statistics, where each update keeps a share of what was there."""
    age = torch.arange(ghosts - 1, -1, -1, device=like.device, dtype=like.dtype)
    # Compilers take a weight anew for each channel, and powers take them most of a batch's time.
    return (1 - keep) * (torch.exp(age * math.log(keep)) if keep > 0 else (age == 0).to(like.dtype))


def average_in_place(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, keep: float) -> bool:
    """Average the statistics (ghosts, C) into running ones of their dtype; return whether that was done."""
    if average_natively(mean, var, running_mean, running_var, keep):
        return True
    if running_mean.dtype != mean.dtype:
        return False
    ghosts = mean.shape[0]
    weights, decay = weights_of_ghosts(ghosts, keep, mean), keep**ghosts
    running_mean.addmv_(mean.t(), weights, beta=decay)  # one call each
    running_var.addmv_(var.t(), weights, beta=decay)
    return True
