"""Samples on their way into a map and out of it: checked once, in the precision of the network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_gap.checks import check_integer
from lightning_gap.monge.maps.conditioning import check_labels
from lightning_gap.monge.ot.checks import check_all_samples
from lightning_gap.monge.samples.batches import UnpairedBatch
from lightning_gap.monge.samples.condition_values import vectors_asked_for
from lightning_gap.monge.samples.conditions import conditions_of
from lightning_gap.monge.samples.features import listed
from lightning_gap.monge.samples.files.read import read_matrix
from lightning_gap.monge.samples.files.table import refuse_not_finite
from lightning_gap.monge.signs import out_of_range

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = [
    "as_network_takes",
    "by_batches",
    "checked",
    "conditions_for",
    "decoded",
    "device_of",
    "encoded",
    "evaluating",
    "flat",
    "images",
    "mapped",
    "on_device",
    "predicted",
    "read_samples",
    "transport",
]


def as_network_takes(module: nn.Module, x: Tensor) -> Tensor:
    """Return samples in the precision of a network: NumPy's is double, and few networks are."""
    parameter = next(module.parameters(), None)
    dtype = parameter.dtype if parameter is not None else x.dtype
    return x.to(dtype if dtype.is_floating_point else torch.get_default_dtype())


def on_device(model: "MongeMap", x: Tensor) -> Tensor:
    """Return samples where the network is, in its precision."""
    return as_network_takes(model, x.to(model.device))


def checked(model: "MongeMap", batch: Any) -> UnpairedBatch:
    """Return a batch in the precision of the network; a device is waited for once."""
    if not isinstance(batch, UnpairedBatch):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"a batch must be an UnpairedBatch or a pair (source, target) of (n, d) tensors, got "
                f"{type(batch).__name__}: use SamplesDataModule, or a loader that yields such batches"
            )
        batch = UnpairedBatch(*batch)
    source, target = batch.source, batch.target
    sets: dict[str, Any] = {"source": source, "target": target}
    check_all_samples({n: x.flatten(0, 1) if isinstance(x, Tensor) and x.dim() == 3 else x for n, x in sets.items()})
    if source.shape[-1] != target.shape[-1] or source.shape[:-2] != target.shape[:-2]:
        raise ValueError(
            f"source has shape {tuple(source.shape)} but target {tuple(target.shape)}: all but the numbers of samples "
            "must agree"
        )
    _check_labels(model.map, batch.condition)
    floats = {
        name: as_network_takes(model, value)
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return cast(UnpairedBatch, batch._replace(**floats))


def _check_labels(net: Any, condition: Any) -> None:
    """Refuse unknown labels, once a batch: on a GPU the map itself does not wait to look at them."""
    conditions = getattr(net, "conditions", None)
    if isinstance(conditions, int) and isinstance(condition, Tensor) and not condition.is_floating_point():
        check_labels(condition, conditions)


def flat(x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return samples of K conditions as rows, with the condition of each."""
    if x.dim() == 2:
        return x, condition
    return x.flatten(0, 1), None if condition is None else condition.repeat_interleave(x.shape[1], dim=0)


def images(model: "MongeMap", x: Tensor, condition: Tensor | None) -> Tensor:
    """Return the images of encoded samples, differentiably."""
    return cast(Tensor, model(*flat(x, condition))).view(x.shape)


def mapped(net: nn.Module | None, x: Tensor, condition: Tensor | None) -> Tensor:
    """Return what a network makes of encoded samples."""
    if net is None:
        raise MisconfigurationException("MongeMap has no network yet: give dim= or map=, or fit it first")
    if not getattr(net, "conditional", False):
        y = net(x)
    elif condition is None:
        raise ValueError("this map is conditional: give condition=, a label or a vector for each sample")
    else:
        y = net(x, condition)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"the map returned {got} for samples of shape {tuple(x.shape)}: it must keep the shape")
    return y.to(x.dtype)


def predicted(model: "MongeMap", batch: Any) -> Tensor:
    """Return the raw images of a batch to predict."""
    if isinstance(batch, UnpairedBatch):
        b = checked(model, batch)
        return decoded(model, images(model, b.source, b.condition))
    if isinstance(batch, Tensor):
        refuse_not_finite("a batch", batch, features=model.feature_names)
        return _raw_images(model, batch, None)
    condition = batch[1] if getattr(model.map, "conditional", False) else None
    _check_labels(model.map, condition)
    if condition is not None:
        _say_if_out_of_range(model, condition)
    return _raw_images(model, batch[0], condition)


def _raw_images(model: "MongeMap", x: Tensor, condition: Tensor | None) -> Tensor:
    return decoded(model, model(encoded(model, x), condition))


def encoded(model: "MongeMap", x: Tensor) -> Tensor:
    """Return raw samples in the map's coordinates."""
    return as_network_takes(model, x if model.representation is None else model.representation.encode(x))


def decoded(model: "MongeMap", x: Tensor) -> Tensor:
    """Return samples of the map's coordinates as raw ones."""
    return x if model.representation is None else as_network_takes(model, model.representation.decode(x))


@torch.no_grad()
def transport(
    model: "MongeMap", x: Any, condition: Any, *, batch_size: int, layer: str | None, obsm: str | None
) -> Tensor:
    """Return the images of raw samples: see :meth:`MongeMap.transport`."""
    return by_batches(model, x, condition, _raw_images, batch_size=batch_size, layer=layer, obsm=obsm)


def by_batches(
    model: "MongeMap",
    x: Any,
    condition: Any,
    function: Callable[["MongeMap", Tensor, Tensor | None], Tensor],
    *,
    batch_size: int,
    layer: str | None,
    obsm: str | None,
) -> Tensor:
    """Return what a function makes of raw samples and their conditions, in evaluation mode and a batch at once."""
    x = read_samples(model, "x", x, layer, obsm)
    check_integer("batch_size", batch_size)
    each, device = conditions_for(model, condition, len(x)), device_of(model)
    with evaluating(model):
        rows = x.split(batch_size)
        conditions = [None] * len(rows) if each is None else each.to(device).split(batch_size)
        parts = [function(model, part.to(device), c).to(x.device) for part, c in zip(rows, conditions, strict=True)]
    return torch.cat(parts, dim=-2)


def read_samples(model: "MongeMap", name: str, x: Any, layer: str | None, obsm: str | None) -> Tensor:
    """Return raw samples as a tensor, or refuse them by the name of their argument."""
    names = model.feature_names
    x = x if isinstance(x, Tensor) else read_matrix(name, x, names, layer=layer, obsm=obsm)
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape (n, d), got {tuple(x.shape)}")
    if names is not None and x.shape[1] != len(names):
        raise ValueError(
            f"{name} has {x.shape[1]} columns, and the map takes {len(names)} features ({listed(names)}): they must "
            "agree"
        )
    refuse_not_finite(name, x, features=names)
    return cast(Tensor, x)


def device_of(model: "MongeMap") -> torch.device:
    """Return where the network is."""
    return next(model.parameters(), model.started).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        # Module by module: a layer that its owner froze in evaluation mode stays there.
        for module in training:
            module.training = True


def conditions_for(model: "MongeMap", condition: Any, n: int) -> Tensor | None:
    """Return the condition of each of some samples, as the network takes it."""
    if condition is None:
        return None
    if not getattr(model.map, "conditional", False):
        raise ValueError(f"condition={condition!r} was given, and this map has no conditions: leave it out")
    if model.condition_encoding is not None and not isinstance(condition, Tensor):
        return as_network_takes(model, vectors_asked_for(condition, n, model.condition_encoding))
    vector_dim = getattr(model.map, "condition_dim", None)
    labels = getattr(model.map, "conditions", None) is not None
    each = conditions_of(condition, n, model.condition_names or (), vector_dim=vector_dim, labels=labels)
    _say_if_out_of_range(model, each)
    return as_network_takes(model, each) if each.is_floating_point() else each


def _say_if_out_of_range(model: "MongeMap", vectors: Tensor) -> None:
    if model.condition_range is not None and (message := out_of_range(vectors, model.condition_range)):
        rank_zero_warn(message)
