"""What convolutions add to the gradients of their parameters."""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from lightning_gap.regime.noise_sources.calls import Call, CannotMeasureError, Part
from lightning_gap.regime.noise_sources.contributions import Factors, Sums, wide

__all__ = ["convolution_parts", "transposed_parts"]

_GRADIENTS: dict[int, Any] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def convolution_parts(layer: Any, call: Call, delta: Tensor) -> Iterator[Part]:
    """Yield what a convolution adds: its weight meets a patch of the input at each of its outputs."""
    x = call.inputs[0]
    _check(layer, call, x)
    parts = layer.groups

    def expand(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        return _patches(layer, x), delta.flatten(2).unflatten(1, (parts, -1)).transpose(2, 3)

    def form(x: Tensor, delta: Tensor, groups: int) -> Tensor:
        return _formed(layer, x, delta, groups)

    if layer.weight is not None:
        width, height = layer.weight[0].numel(), len(layer.weight) // parts
        terms = delta[0, 0].numel()
        yield (
            layer.weight,
            Factors.of(x, delta, expand, parts=parts, terms=terms, width=width, height=height, form=form),
        )
    if layer.bias is not None:
        yield layer.bias, Sums(wide(delta).flatten(2).sum(2))


def transposed_parts(layer: Any, call: Call, delta: Tensor) -> Iterator[Part]:
    """Yield what a transposed convolution adds: what it is the transpose of is given the gradients of its outputs."""
    x = call.inputs[0]
    _check(layer, call, x)
    parts = layer.groups

    def expand(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        sizes = x.shape[2:]
        patches = _patches(layer, delta)
        outputs = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                delta.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
            )
        ]
        # With output_padding of a stride and more there are outputs past the inputs.
        seen = patches.unflatten(2, outputs)[(..., *(slice(size) for size in sizes), slice(None))]
        return seen.flatten(2, -2), x.flatten(2).unflatten(1, (parts, -1)).transpose(2, 3)

    width = layer.weight[0].numel()
    yield (
        layer.weight,
        Factors.of(x, delta, expand, parts=parts, terms=x[0, 0].numel(), width=width, height=x.shape[1] // parts),
    )
    if layer.bias is not None:
        yield layer.bias, Sums(wide(delta).flatten(2).sum(2))


def _check(layer: Any, call: Call, x: Tensor) -> None:
    if x.dim() != len(layer.kernel_size) + 2 or len(x) != call.examples:
        raise CannotMeasureError(f"its input of shape {tuple(x.shape)} has not one row for each of {call.examples}")


def _padded(layer: Any, x: Tensor) -> Tensor:
    """Return what a convolution without padding is given."""
    if layer.padding == "valid":
        return x
    if layer.padding == "same":
        reach = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [side for more in reversed(reach) for side in (more // 2, more - more // 2)]
    else:
        sides = [side for side in reversed(layer.padding) for _ in range(2)]
    return F.pad(x, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def _patches(layer: Any, x: Tensor) -> Tensor:
    """Return what each output of a convolution sees of x, (b, parts, t, m)."""
    x = _padded(layer, x).contiguous()
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    reach = [step * (size - 1) + 1 for step, size in zip(dilation, kernel, strict=True)]
    outputs = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    rows, channels, *steps = x.stride()
    within = [step * times for step, times in zip(steps, dilation, strict=True)]
    between = [step * times for step, times in zip(steps, stride, strict=True)]
    view = x.as_strided((*x.shape[:2], *kernel, *outputs), (rows, channels, *within, *between))
    return view.reshape(len(x), layer.groups, x.shape[1] // layer.groups * prod(kernel), prod(outputs)).transpose(2, 3)


def _formed(layer: Any, x: Tensor, delta: Tensor, groups: int) -> Tensor:
    """Return the gradients of the weight of groups of examples: of one convolution with their channels apart."""
    by_zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not by_zeros:
        x = _padded(layer, x)
    # A group's examples stay examples, and the channels of the groups stand beside each other.
    x, delta = (f.unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2) for f in (x, delta))
    shape = (groups * len(layer.weight), *layer.weight.shape[1:])
    formed: Tensor = _GRADIENTS[len(layer.kernel_size)](
        x.contiguous(), shape, delta.contiguous(), layer.stride, layer.padding if by_zeros else 0, layer.dilation,
        groups * layer.groups,
    )  # fmt: skip
    return formed.view(groups, -1)
