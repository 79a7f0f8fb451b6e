"""What multi-head attention adds: its projections are no layers that are called, so their gradients are found again."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gap.regime.noise_sources.calls import Call, CannotMeasureError, Part, linear_parts
from lightning_gap.regime.noise_sources.contributions import Factors, Sums

__all__ = ["attention_parts"]


def attention_parts(layer: Any, call: Call, delta: Tensor) -> Iterator[Part]:
    """Yield what the projections add: attention between the projected inputs is run again, and differentiated.

    That is exact where nothing is drawn: dropout of attention weights in training cannot be run again.
    """
    given = inspect.signature(nn.MultiheadAttention.forward).bind(layer, *call.inputs, **call.named).arguments
    if layer.dropout > 0 and layer.training:
        raise CannotMeasureError("its dropout draws anew when attention is run again: set it to 0")
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        raise CannotMeasureError("it has add_bias_kv or add_zero_attn")
    inputs = [given[name] for name in ("query", "key", "value")]
    if not layer.batch_first or delta.dim() != 3 or len(delta) != call.examples:
        raise CannotMeasureError("its inputs must have the shape (examples, t, features), the batch first")
    if layer.in_proj_weight is not None:
        weights = list(layer.in_proj_weight.detach().chunk(3))
    else:
        named = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        weights = [weight.detach() for weight in named if weight is not None]
    biases = [None] * 3 if layer.in_proj_bias is None else list(layer.in_proj_bias.detach().chunk(3))
    with torch.enable_grad():
        projected = [
            F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype)).requires_grad_()
            for x, w, b in zip(inputs, weights, biases, strict=True)
        ]
        met = _attend(layer, projected, given.get("key_padding_mask"), given.get("attn_mask"))
        output = F.linear(delta, layer.out_proj.weight.detach().T.to(delta.dtype))
        gradients = torch.autograd.grad(met, projected, output.to(met.dtype))
    if layer.in_proj_weight is None:
        for weight, x, gradient in zip(
            (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight), inputs, gradients, strict=True
        ):
            yield from linear_parts(weight, None, x, gradient)
    elif inputs[0] is inputs[1] is inputs[2]:
        yield from linear_parts(layer.in_proj_weight, None, inputs[0], torch.cat(gradients, -1))
    else:
        parts = [
            _third(layer, x, gradient, place) for place, (x, gradient) in enumerate(zip(inputs, gradients, strict=True))
        ]
        yield layer.in_proj_weight, parts[0].joined(parts[1:])
    if layer.in_proj_bias is not None:
        yield layer.in_proj_bias, Sums(torch.cat([gradient.sum(1) for gradient in gradients], -1))
    yield from linear_parts(layer.out_proj.weight, layer.out_proj.bias, met.detach(), delta)


def _attend(
    layer: nn.MultiheadAttention, projected: list[Tensor], padding: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Return what the heads make of projected inputs, before the last projection."""
    width, same = layer.embed_dim, torch.eye(layer.embed_dim, dtype=projected[0].dtype, device=projected[0].device)
    query, key, value = (x.transpose(0, 1) for x in projected)
    met, _ = F.multi_head_attention_forward(
        query, key, value, width, layer.num_heads, None, None, None, None, False, 0.0, same, None,
        training=False, key_padding_mask=padding, need_weights=False, attn_mask=mask,
        use_separate_proj_weight=True, q_proj_weight=same, k_proj_weight=same, v_proj_weight=same,
    )  # fmt: skip
    return met.transpose(0, 1)


def _third(layer: Any, x: Tensor, gradient: Tensor, place: int) -> Factors:
    width = layer.embed_dim
    padded = F.pad(gradient, (place * width, (2 - place) * width))
    ((_, part),) = linear_parts(layer.in_proj_weight, None, x, padded)
    assert isinstance(part, Factors)
    return part
