"""Recomputation of running statistics from data, for weights that stay as they are."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_gap.ghost.layers import GhostNorm, statistics_of
from lightning_gap.ghost.samples import BatchRows, samples_in
from lightning_gap.ghost.training_step import leaving_no_trace, own_batches, own_randomness, step_of
from lightning_gap.precision import widest
from lightning_gap.ranks.group import sum_over_ranks, unwrapped
from lightning_gap.trainer.internals.of_torch import BatchNormBase

__all__ = ["average_statistics", "recalibrate_batchnorm", "recalibrate_in_training"]

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def recalibrate_batchnorm(
    module: Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[Any], Any] | None = None,
    max_batches: int | None = None,
) -> Module:
    r"""Go beyond ``torch.optim.swa_utils.update_bn``: over ghosts, ranks, batches of any form, and undone on error.

    The running statistics of all BatchNorm layers, plain or ghost, become plain averages over ``loader``.

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
        forward: What to do with a batch. By default ``module(batch)``, or ``module(batch[0])`` for a tuple or list; for
            a ``LightningModule`` without a ``forward``, or with dictionaries as batches, its ``training_step``, whose
            logs and other traces in the module are undone.
        max_batches: How many batches to take; None for all.

    Returns:
        ``module`` itself. Weights, training modes and momenta are those of before; the number of updates is B. Layers
        that no batch reaches, and layers without running statistics, are left as they are.

    Raises:
        ValueError: If there is no layer with running statistics, or no batch, or if a module with manual optimization
            has nothing else to do with a batch. After an error the statistics are those of before.
        TypeError: If batches are dictionaries and ``forward`` does not say what to do with them.

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
        layer for layer in inner.modules() if isinstance(layer, BatchNormBase) and layer.running_mean is not None
        and layer.track_running_stats
    ]  # fmt: skip
    if not layers:
        raise ValueError(f"module {type(inner).__name__} has no BatchNorm layer with running statistics to recalibrate")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, or None for all batches, got {max_batches}")
    device = next((p.device for p in inner.parameters()), torch.device("cpu"))

    def run(batch: Any, index: int) -> None:
        batch = apply_to_collection(batch, Tensor, lambda t: t.to(device))
        dictionary = isinstance(batch, Mapping)
        if forward is not None:
            forward(batch)
        elif isinstance(inner, LightningModule) and (dictionary or type(inner).forward is LightningModule.forward):
            with leaving_no_trace(inner, layers):
                step_of(inner)(batch, index)
        elif dictionary:
            raise TypeError(
                f"a batch is a dictionary with {list(batch)}: say what to do with it, such as "
                f"recalibrate_batchnorm(module, loader, forward=lambda batch: module(batch[{next(iter(batch), '')!r}]))"
            )
        else:
            inner(batch[0] if isinstance(batch, tuple | list) else batch)

    average_statistics(inner, layers, islice(loader, max_batches), run)
    return module


@torch.no_grad()
def average_statistics(
    module: nn.Module, layers: Sequence[BatchNormBase], batches: Iterable[Any], run: Callable[[Any, int], Any]
) -> None:
    """Give BatchNorm layers plain averages of their statistics over batches; undone on an error; collective."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    before = [
        (layer, layer.momentum, {k: b.clone() for k, b in layer.named_buffers(recurse=False)}) for layer in layers
    ]
    rows = {
        layer.rows_per_sample: layer.rows_per_sample.samples
        for layer in layers
        if isinstance(layer, GhostNorm) and isinstance(layer.rows_per_sample, BatchRows)
    }
    try:
        module.eval()
        for layer in layers:
            layer.training = True  # and not what it may hold, such as dropout
            layer.reset_running_stats()
            layer.momentum = None
        seen = 0
        for index, batch in enumerate(batches):
            for each in rows:
                each.samples = samples_in(batch)
            run(batch, index)
            seen += 1
        if not seen:
            raise ValueError("loader gave no batch to recalibrate with")
        _average_over_ranks(layers)
    except BaseException:
        for layer, _, buffers in before:
            _restore(layer, buffers)
        raise
    finally:
        for each, samples in rows.items():
            each.samples = samples
        for submodule, training in modes.items():
            submodule.training = training
        for layer, momentum, _ in before:
            layer.momentum = momentum
    for layer, _, buffers in before:
        if not layer.num_batches_tracked:  # no batch came by
            _restore(layer, buffers)


def recalibrate_in_training(trainer: Trainer, layers: Sequence[BatchNormBase], batches: int) -> None:
    """Take the statistics of layers anew from training batches, and change nothing else of the run; collective."""
    module, stage = trainer.lightning_module, trainer.state.stage
    step = step_of(module)
    updates = [(layer, statistics_of(layer)[2].clone()) for layer in layers if layer.momentum is not None]
    trainer.training = True  # for the hooks that make batches ready
    try:
        with (
            own_randomness(trainer.global_step),
            leaving_no_trace(module, layers),
            trainer.precision_plugin.train_step_context(),
        ):
            average_statistics(module, layers, own_batches(trainer, batches), step)
    except Exception as error:
        error.add_note("This happened while GhostBatchNorm(recalibrate=...) ran training_step without gradients.")
        raise
    finally:
        trainer.state.stage = stage
    for layer, count in updates:  # of training
        statistics_of(layer)[2].copy_(count)


def _average_over_ranks(layers: Sequence[BatchNormBase]) -> None:
    for layer in layers:
        mean, var, updates = statistics_of(layer)
        total = sum_over_ranks(updates)
        share = (updates.to(widest(mean.device)) / total.clamp(min=1)).to(mean.dtype)  # int by int would be float32
        updates.copy_(total)
        for running in (mean, var):
            running.copy_(sum_over_ranks(running * share))


def _restore(layer: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in layer.named_buffers(recurse=False):
        buffer.copy_(buffers[name])
