"""Checks of samples, weights and epsilons: every message names the argument, what is wrong, and the remedy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_gap.checks import check_number
from lightning_gap.monge.ot.compiling import eager
from lightning_gap.precision import widest
from lightning_gap.trainer.internals.of_torch import is_wrapped_by_transform

__all__ = [
    "check_all_samples",
    "check_epsilon",
    "check_pair",
    "check_samples",
    "check_transforms",
    "check_weights",
    "solver_precision",
]


@eager
def check_samples(name: str, samples: Tensor) -> None:
    """Raise unless ``samples`` is a non-empty ``(n, d)`` tensor of finite floating-point numbers."""
    check_all_samples({name: samples})


def check_all_samples(samples: Mapping[str, Tensor]) -> None:
    """Do :func:`check_samples` for several tensors, for whose values a device is waited for once."""
    for name, x in samples.items():
        _check_form(name, x)
    _check_finite(samples)


def _check_form(name: str, samples: Tensor) -> None:
    if not isinstance(samples, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(samples).__name__}: use torch.as_tensor({name})")
    if not samples.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {samples.dtype}: use {name}.float()")
    if samples.dim() != 2:
        remedy = "add the missing dimension, as in x[:, None]" if samples.dim() == 1 else "flatten each sample"
        raise ValueError(f"{name} must have shape (n, d), got {tuple(samples.shape)}: {remedy}")
    if samples.numel() == 0:
        raise ValueError(f"{name} is empty, with shape {tuple(samples.shape)}: it needs at least one sample")


def _check_finite(samples: Mapping[str, Tensor]) -> None:
    # A finite sum says that all are, at a fraction of the time; one that is not may have overflowed.
    for (name, x), total in zip(samples.items(), _numbers([x.detach().sum() for x in samples.values()]), strict=True):
        if math.isfinite(total):
            continue
        finite = x.detach().isfinite()
        if not bool(finite.all()):
            bad = (~finite).any(dim=1).nonzero().flatten()
            rows = ", ".join(str(int(i)) for i in bad[:5]) + (", ..." if len(bad) > 5 else "")
            raise ValueError(
                f"{name} holds NaN or infinity in {len(bad)} of {len(x)} rows ({rows}): "
                "remove them, or lower the learning rate if a network made them"
            )


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Return the values of scalars, for which a device is waited for once."""
    devices = {scalar.device for scalar in scalars}
    if len(devices) > 1 or {device.type for device in devices} == {"cpu"}:
        return [float(scalar) for scalar in scalars]
    dtype = widest(scalars[0].device)
    values: list[float] = torch.stack([scalar.to(dtype) for scalar in scalars]).tolist()
    return values


def check_pair(x_name: str, x: Tensor, y_name: str, y: Tensor, *, same_length: bool = False) -> None:
    """Raise unless both are valid samples of one dimension, dtype and device, and of one length if paired by row."""
    both = {x_name: x, y_name: y}
    for name, samples in both.items():
        _check_form(name, samples)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{x_name} has dimension {x.shape[1]} but {y_name} has {y.shape[1]}: they must agree")
    if same_length and len(x) != len(y):
        raise ValueError(
            f"{x_name} has {len(x)} rows but {y_name} has {len(y)}: they are paired row by row, and must agree"
        )
    if x.dtype != y.dtype:
        raise TypeError(f"{x_name} is {x.dtype} but {y_name} is {y.dtype}: convert one with .to(dtype)")
    if x.device != y.device:
        raise ValueError(f"{x_name} is on {x.device} but {y_name} on {y.device}: move one with .to(device)")
    _check_finite(both)


@eager
def check_weights(
    name: str, weights: Tensor | None, samples: Tensor, *, balanced: bool = True, check: bool = True
) -> Tensor:
    """Return ``(n,)`` weights of the samples, uniform where there are none; ``check`` unless that has been done.

    Balanced weights that sum to 1 but for rounding are rescaled, so that two sets have the same mass.
    """
    if weights is None:
        return samples.new_full((len(samples),), 1 / len(samples))
    if check:
        total = _checked_total(name, weights, samples)
        if balanced and abs(total - 1) > 1e-3:
            raise ValueError(f"{name} must sum to 1, got {total:.6g}: divide it by its sum")
    weights = weights.to(dtype=samples.dtype, device=samples.device)
    return weights / weights.detach().sum() if balanced else weights


def _checked_total(name: str, weights: Tensor, samples: Tensor) -> float:
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(weights).__name__}")
    if weights.shape != (len(samples),):
        raise ValueError(f"{name} must have shape ({len(samples)},), one weight a sample, got {tuple(weights.shape)}")
    bad = ~((weights >= 0) & weights.isfinite())
    some_are_bad, total = _numbers([bad.any(), weights.detach().sum(dtype=samples.dtype)])
    if some_are_bad:
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{name} must be finite and non-negative, got {float(weights.detach()[row])} in row {row}: "
            f"correct it, or leave the sample out by a weight of 0"
        )
    if total <= 0:
        raise ValueError(f"{name} must not all be 0: give some samples a positive weight")
    return total


def check_epsilon(name: str, epsilon: float | Tensor | None) -> float | None:
    """Return ``epsilon`` as a positive finite number, or ``None``."""
    return None if epsilon is None else check_number(name, epsilon, above=0)


def solver_precision(samples: Tensor) -> Tensor:
    """Return half-precision samples as float32: exponentials of costs do not fit in sixteen bits."""
    return samples.float() if samples.dtype in (torch.float16, torch.bfloat16) else samples


@eager
def check_transforms(*inputs: Any) -> None:
    """Raise ``NotImplementedError`` inside a transform of ``torch.func`` or forward-mode differentiation."""
    # Solvers compute outside of torch, where a tangent or a batch of torch.func would be lost.
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    if any(is_wrapped_by_transform(t) or forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "distances between samples do not support torch.func (grad, jacrev, jvp, vmap, ...) nor forward-mode "
            "differentiation: use torch.autograd.grad or torch.autograd.functional (jacobian, hessian), and "
            "(B, n, d) samples for B problems at once"
        )
