"""What a step of a map is given: checked once, here, and trusted from then on."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_gap.monge.maps.networks import check_labels
from lightning_gap.monge.ot.checks import check_all_samples
from lightning_gap.monge.samples.batches import UnpairedBatch

__all__ = ["as_network_takes", "checked", "checked_labels"]


def as_network_takes(module: nn.Module, x: Tensor) -> Tensor:
    """Return samples in the precision of a network: NumPy's is double, and few networks are."""
    parameter = next(module.parameters(), None)
    dtype = parameter.dtype if parameter is not None else x.dtype
    return x.to(dtype if dtype.is_floating_point else torch.get_default_dtype())


def checked(module: nn.Module, net: Any, batch: Any) -> UnpairedBatch:
    """Return a batch in the precision of the network; a device is waited for once."""
    if not isinstance(batch, UnpairedBatch):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"a batch must be an UnpairedBatch or a pair (source, target) of (n, d) tensors, got "
                f"{type(batch).__name__}: use SamplesDataModule, or a loader that yields such batches"
            )
        batch = UnpairedBatch(*batch)
    source, target = batch.source, batch.target
    check_all_samples({name: _rows(samples) for name, samples in (("source", source), ("target", target))})
    if source.shape[-1] != target.shape[-1] or source.shape[:-2] != target.shape[:-2]:
        raise ValueError(
            f"source has shape {tuple(source.shape)} but target {tuple(target.shape)}: all but the numbers of samples "
            "must agree"
        )
    checked_labels(net, batch.condition)
    floats = {
        name: as_network_takes(module, value)
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return cast(UnpairedBatch, batch._replace(**floats))


def checked_labels(net: Any, condition: Any) -> None:
    """Refuse unknown labels, once a batch: on a GPU the map itself does not wait to look at them."""
    conditions = getattr(net, "conditions", None)
    if isinstance(conditions, int) and isinstance(condition, Tensor) and not condition.is_floating_point():
        check_labels(condition, conditions)


def _rows(samples: Any) -> Any:
    return samples.flatten(0, 1) if isinstance(samples, Tensor) and samples.dim() == 3 else samples
