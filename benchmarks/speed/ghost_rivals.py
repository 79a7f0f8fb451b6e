"""What Ghost BN is measured against: BatchNorm, designs of others, and the passes over memory that it must make."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gap import convert_ghost_batchnorm

__all__ = ["Chunks", "bare_image_passes", "bare_passes", "rivals", "tensors"]


class Chunks(nn.Module):
    """A loop over chunks, each through the layer."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(chunk) for chunk in x.chunk(-(-len(x) // self.size))])


class Splits(nn.Module):
    """One call on a view whose channels are the ghosts' channels."""

    def __init__(self, layer: nn.Module, splits: int) -> None:
        super().__init__()
        self.layer, self.splits = layer, splits
        self.mean, self.var = (t.repeat(splits) for t in (layer.running_mean, layer.running_var))

    def forward(self, x: Tensor) -> Tensor:
        layer, splits = self.layer, self.splits
        view = x.view(-1, x.shape[1] * splits, *x.shape[2:])
        weight, bias = layer.weight.repeat(splits), layer.bias.repeat(splits)
        return nn.functional.batch_norm(view, self.mean, self.var, weight, bias, True, 0.1, layer.eps).view(x.shape)


def plain(shape: tuple[int, ...], **options: Any) -> nn.Module:
    return (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1], **options)


def rivals(shape: tuple[int, ...], memory: str, size: int, device: str) -> dict[str, nn.Module]:
    found = {
        "plain": plain(shape),
        "contiguous": convert_ghost_batchnorm(plain(shape), size),
        "strided": convert_ghost_batchnorm(plain(shape), size, grouping="strided"),
        "chunks": Chunks(plain(shape), size),
    }
    if memory != "channels_last":
        found["splits"] = Splits(plain(shape).to(device), shape[0] // size)
    if len(shape) == 2:
        try:
            from pytorch_tabnet.tab_network import GBN
        except ImportError:
            pass
        else:
            found["tabnet"] = GBN(shape[1], virtual_batch_size=size)
    return {name: module.to(device) for name, module in found.items()}


def tensors(shape: tuple[int, ...], memory: str, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    order = torch.channels_last if memory == "channels_last" else torch.contiguous_format
    x, upstream = (torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=order) for _ in range(2))
    return x.requires_grad_(), upstream


def bare_passes(x: Tensor, upstream: Tensor, size: int) -> Callable[[], None]:
    """Nine passes over all ghosts at a time: two sums, squares, y; products, two sums, two terms of the gradient."""
    ghosts, gradients = (t.unflatten(0, (-1, size)) for t in (x, upstream))
    table, aten = ghosts.mean(1, True), torch.ops.aten

    def run() -> None:
        y, scratch, grad_x = (torch.empty_like(ghosts) for _ in range(3))
        torch.sum(ghosts, 1, True)
        aten.mse_loss.out(ghosts, table, 0, out=scratch)
        torch.sum(scratch, 1, True)
        torch.addcmul(table, ghosts, table, out=y)
        aten.mse_loss_backward.grad_input(gradients, ghosts, table, 0, grad_input=scratch)
        torch.sum(scratch, 1, True)
        torch.sum(gradients, 1, True)
        torch.addcmul(table, ghosts, table, out=grad_x).addcmul_(gradients, table)

    return run


def bare_image_passes(x: Tensor, upstream: Tensor, size: int) -> Callable[[], None]:
    """One call a ghost for the statistics, for y and for the two sums, and two for the gradient."""
    aten, channels = torch.ops.aten, x.shape[1]
    zero, one, none = torch.zeros(channels), torch.ones(channels), torch.empty(0)
    scale = one.view(-1, 1, 1)
    nchw = x.is_contiguous()

    def run() -> None:
        y, grad_x = torch.empty_like(x), torch.empty_like(x)
        for part, out in zip(x.split(size), y.split(size), strict=True):
            torch.batch_norm_update_stats(part.flatten(1) if nchw else part, None, None, 0.0)
            aten.native_batch_norm.out(
                part, one, zero, zero, one, False, 0.0, 0.0, out=out, save_mean=none, save_invstd=none
            )
        for part, gradient, out in zip(x.split(size), upstream.split(size), grad_x.split(size), strict=True):
            aten.native_batch_norm_backward(
                gradient, part, one, None, None, zero, one, True, 0.0, [False, True, True]
            )  # fmt: skip
            aten.native_batch_norm.out(
                part, one, zero, zero, one, False, 0.0, 0.0, out=out, save_mean=none, save_invstd=none
            )
            out.addcmul_(gradient, scale)

    return run
