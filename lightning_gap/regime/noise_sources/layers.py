"""What each kind of layer adds to its parameters' gradients: a rule a kind, of inputs and gradients of outputs."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gap.regime.noise_sources.attention import attention_parts
from lightning_gap.regime.noise_sources.calls import Call, CannotMeasureError, Part, linear_parts
from lightning_gap.regime.noise_sources.contributions import Lookups, Sums, wide
from lightning_gap.regime.noise_sources.convolutions import convolution_parts, transposed_parts
from lightning_gap.trainer.internals.of_torch import BatchNormBase

__all__ = ["rule_of"]

Rule = Callable[[Any, Call, Tensor], Iterator[Part]]


def _linear(layer: nn.Linear, call: Call, delta: Tensor) -> Iterator[Part]:
    yield from linear_parts(layer.weight, layer.bias, call.terms(call.inputs[0]), call.terms(delta))


def _embedding(layer: nn.Embedding, call: Call, delta: Tensor) -> Iterator[Part]:
    rows = call.inputs[0]
    if layer.scale_grad_by_freq:
        raise CannotMeasureError("scale_grad_by_freq counts over the batch")
    if rows.dim() == 1 and len(rows) > 1 and torch.equal(rows, torch.arange(len(rows), device=rows.device)):
        raise CannotMeasureError("it is given positions, which all examples share")
    rows, delta = call.by_example(rows).flatten(1), call.terms(delta)
    if layer.padding_idx is not None:
        delta = delta * (rows != layer.padding_idx)[..., None]
    yield layer.weight, Lookups(rows, delta, layer.num_embeddings)


def _scale_and_shift(layer: Any, normalized: Tensor, delta: Tensor) -> Iterator[Part]:
    """Yield what a scale and a shift add, of values and gradients (examples, t, p)."""
    if layer.weight is not None:
        yield layer.weight, Sums((wide(normalized) * wide(delta)).sum(1))
    if getattr(layer, "bias", None) is not None:
        yield layer.bias, Sums(wide(delta).sum(1))


def _layer_norm(layer: nn.LayerNorm, call: Call, delta: Tensor) -> Iterator[Part]:
    x, shape = call.inputs[0], layer.normalized_shape
    normalized = F.layer_norm(wide(x), shape, None, None, layer.eps)
    yield from _scale_and_shift(
        layer, call.terms(normalized, len(shape)).flatten(2), call.terms(delta, len(shape)).flatten(2)
    )


def _rms_norm(layer: nn.RMSNorm, call: Call, delta: Tensor) -> Iterator[Part]:
    x, shape = call.inputs[0], list(layer.normalized_shape)
    normalized = F.rms_norm(x, shape, None, layer.eps)  # the default ε follows the precision of x
    yield from _scale_and_shift(
        layer, call.terms(normalized, len(shape)).flatten(2), call.terms(delta, len(shape)).flatten(2)
    )


def _scale_and_shift_channels(layer: Any, call: Call, normalized: Tensor, delta: Tensor) -> Iterator[Part]:
    """Yield what a scale and a shift of channels add, of values and gradients (examples · k, C, ...)."""
    if delta.dim() < 2:
        raise CannotMeasureError("its input has no dimension of the examples")

    def summed(values: Tensor) -> Sums:
        return Sums(call.by_example(values.flatten(2).sum(2) if values.dim() > 2 else values).sum(1))

    if layer.weight is not None:
        yield layer.weight, summed(normalized * wide(delta))
    if layer.bias is not None:
        yield layer.bias, summed(wide(delta))


def _group_norm(layer: nn.GroupNorm, call: Call, delta: Tensor) -> Iterator[Part]:
    normalized = F.group_norm(wide(call.inputs[0]), layer.num_groups, None, None, layer.eps)
    yield from _scale_and_shift_channels(layer, call, wide(normalized), delta)


def _by_running_statistics(layer: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, None, None, False, 0.0, layer.eps)


def _instance_norm(layer: Any, call: Call, delta: Tensor) -> Iterator[Part]:
    x = wide(call.inputs[0])
    dims = next(dims for dims, kind in enumerate(_INSTANCE_NORMS, 3) if isinstance(layer, kind))
    if x.dim() != dims:
        raise CannotMeasureError("its input has no dimension of the examples")
    own = layer.training or not layer.track_running_stats
    normalized = F.instance_norm(x, eps=layer.eps) if own else _by_running_statistics(layer, x)
    yield from _scale_and_shift_channels(layer, call, wide(normalized), delta)


def _batch_norm(layer: Any, call: Call, delta: Tensor) -> Iterator[Part]:
    """Frozen layers normalize nothing over the batch; those of ghosts tell what they made of their input."""
    x = call.inputs[0]
    over_ghosts = getattr(layer, "normalized", None)
    if layer.training or layer.running_mean is None:
        if over_ghosts is None:
            raise CannotMeasureError("it normalizes over the whole micro-batch")
        normalized = over_ghosts(x)
    else:
        normalized = _by_running_statistics(layer, wide(x))
    yield from _scale_and_shift_channels(layer, call, wide(normalized), delta)


_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.MultiheadAttention: attention_parts,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution_parts),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), transposed_parts),
    **dict.fromkeys(_INSTANCE_NORMS, _instance_norm),
    BatchNormBase: _batch_norm,
}


def rule_of(layer: nn.Module) -> Rule | None:
    """Return the rule of a layer; None where its class is not known, or has a ``forward`` of its own."""
    if isinstance(layer, BatchNormBase) and hasattr(layer, "normalized"):
        return _batch_norm
    forward = type(layer).forward
    return next((rule for kind, rule in _RULES.items() if isinstance(layer, kind) and forward is kind.forward), None)
