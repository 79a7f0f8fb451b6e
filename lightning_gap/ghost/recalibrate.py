"""Recomputation of running statistics from data, for weights that stay as they are."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_gap.parallel import sum_over_ranks, unwrapped
from lightning_gap.precision import widest

__all__ = ["recalibrate_batchnorm"]

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def recalibrate_batchnorm(
    module: Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
) -> Module:
    r"""Recompute the running statistics of all BatchNorm layers, plain or ghost, as plain averages over ``loader``.

    A running average over the last few updates is noisy, the more so with ghosts, and lags behind the weights. With the
    weights fixed, each layer's statistics become the average over all B batches (or ghosts) that it sees,

    .. math:: R = \frac{1}{B} \sum_{b=1}^{B} S_b ,

    :math:`S_b` the mean, or the unbiased variance. Each counts the same, so let the loader drop a smaller last batch.
    Only these layers are in training mode meanwhile: dropout is off and no random number is drawn but those of the
    loader. With several processes each gives its part of the data, at least one batch, and all end up with the average
    over all of them.

    Args:
        module: The model; a ``DistributedDataParallel`` wrapper is looked through.
        loader: Batches. Tensors in them are moved to the device of the module's first parameter.
        forward: What to do with a batch; by default ``module(batch)``, or ``module(batch[0])`` for a tuple or list.
        max_batches: How many batches to take; None for all.

    Returns:
        ``module`` itself. Weights, training modes and momenta are those of before; the number of updates is B. Layers
        that no batch reaches, and layers without running statistics, are left as they are.

    Raises:
        ValueError: If there is no layer with running statistics, or no batch. After an error the statistics are those
            of before.

    References:
        Wu, Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3 (precise statistics); Izmailov et al.,
        "Averaging weights leads to wider optima and better generalization", 2018, section 3.2.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [10.0]])]
        >>> recalibrate_batchnorm(layer, batches).running_mean
        tensor([4.])
    """
    inner = unwrapped(module)
    layers = [
        layer for layer in inner.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None
        and layer.track_running_stats
    ]  # fmt: skip
    if not layers:
        raise ValueError(f"module {type(inner).__name__} has no BatchNorm layer with running statistics to recalibrate")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, or None for all batches, got {max_batches}")
    run = forward or (lambda batch: inner(batch[0] if isinstance(batch, (tuple, list)) else batch))
    device = next((p.device for p in inner.parameters()), torch.device("cpu"))

    modes = {submodule: submodule.training for submodule in inner.modules()}
    before = [
        (layer, layer.momentum, {k: b.clone() for k, b in layer.named_buffers(recurse=False)}) for layer in layers
    ]
    try:
        inner.eval()
        for layer in layers:
            layer.training = True  # and not what it may hold, such as dropout
            layer.reset_running_stats()
            layer.momentum = None
        batches = 0
        for batch in islice(loader, max_batches):
            run(apply_to_collection(batch, Tensor, lambda t: t.to(device)))
            batches += 1
        if not batches:
            raise ValueError("loader gave no batch to recalibrate with")
        _average_over_ranks(layers)
    except BaseException:
        for layer, _, buffers in before:
            _restore(layer, buffers)
        raise
    finally:
        for submodule, training in modes.items():
            submodule.training = training
        for layer, momentum, _ in before:
            layer.momentum = momentum
    for layer, _, buffers in before:
        if not layer.num_batches_tracked:  # no batch came by
            _restore(layer, buffers)
    return module


def _average_over_ranks(layers: list[_BatchNorm]) -> None:
    for layer in layers:
        mean, var, updates = layer.running_mean, layer.running_var, layer.num_batches_tracked
        assert mean is not None
        assert var is not None
        assert updates is not None
        total = sum_over_ranks(updates)
        share = (updates.to(widest(mean.device)) / total.clamp(min=1)).to(mean.dtype)  # int by int would be float32
        updates.copy_(total)
        for running in (mean, var):
            running.copy_(sum_over_ranks(running * share))


def _restore(layer: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in layer.named_buffers(recurse=False):
        buffer.copy_(buffers[name])
