"""How ghosts lie in a batch and in memory, and what the kernels hand each other."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LIMITS",
    "Kernel",
    "Limits",
    "Maybe",
    "Normalized",
    "Run",
    "Tables",
    "block",
    "channels_inside",
    "dense",
    "dense_like",
    "flat_view",
    "in_statistics_dtype",
    "statistics_dtype",
]

Maybe = Tensor | None
Normalized = tuple[Tensor, Tensor, Tensor]  # output, means and unbiased variances (ghosts, channels)


class Limits(NamedTuple):
    """From where one way of computing is faster than another, measured.

    Attributes:
        large_ghost: Elements of a ghost from which a native call for each pays.
        block: Elements that a core's cache can hold; the gradient of a large ghost takes twice as many at a time.
        one_visit: Elements of a CPU's batch from which this package's own C++ is taken, and compiled if need be.
        compiled: Elements of a batch of features from which that pays in a compiled graph, which fuses the formula.
    """

    large_ghost: int = 1 << 17
    block: int = 1 << 18
    one_visit: int = 1 << 12
    compiled: int = 1 << 19


LIMITS = Limits()


class Run(NamedTuple):
    """Samples ``start`` to ``stop`` of a batch, which hold ``ghosts`` equal ghosts, contiguous or strided."""

    start: int
    stop: int
    ghosts: int
    strided: bool = False

    def split(self, samples: Tensor) -> Tensor:
        """Return the run of ``samples`` as (ghosts, size, ...), or (size, ghosts, ...) if strided."""
        size = (self.stop - self.start) // self.ghosts
        shape = (size, self.ghosts) if self.strided else (self.ghosts, size)
        run: Tensor = samples[self.start : self.stop].unflatten(0, shape)
        return run


class Tables(NamedTuple):
    """What is known of some ghosts, each (ghosts, C)."""

    mean: Tensor
    var: Tensor
    invstd: Tensor


class Kernel(NamedTuple):
    """How to normalize a run.

    ``forward`` fills ``y`` and the tables. ``backward(run, x, grad_y, weight, tables, out, limits)`` fills ``out``, if
    given, with the gradient of x, and returns those of weight and bias, (2, C).
    """

    forward: Callable[[Run, Tensor, Tensor, Maybe, Maybe, float, Tables, Limits], None]
    backward: Callable[[Run, Tensor, Tensor, Maybe, Tables, Maybe, Limits], Tensor]


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of an input's statistics: no half precision."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def in_statistics_dtype(x: Tensor, *parameters: Maybe) -> list[Maybe]:
    """Cast parameters: float32 ones beside a half-precision input make the native kernels keep float32 statistics."""
    dtype = statistics_dtype(x)
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in parameters]


def channels_inside(x: Tensor) -> bool:
    """Return whether a position's channels lie side by side: (N, C), channels_last, a transposed sequence."""
    return x.is_contiguous() if x.dim() == 2 else x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """Return ``x``, copied if no order of its dimensions makes it dense."""
    return x if channels_inside(x) else x.contiguous()


def flat_view(t: Tensor, channels_inside: bool) -> Tensor:
    """Return a dense view (rows, C), or (samples, C, positions)."""
    if t.dim() == 2 and channels_inside:
        return t
    return t.movedim(1, -1).reshape(-1, t.shape[1]) if channels_inside else t.flatten(2)


def dense_like(t: Tensor, channels_inside: bool) -> Tensor:
    """Return ``t``, such as a gradient, dense and in the wanted order of dimensions."""
    inside = channels_inside and t.dim() > 2
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if inside else t.contiguous()


def block(x: Tensor, limits: Limits) -> int:
    """Return how many elements to take at a time: what the caches hold, or on a GPU, without such caches, all."""
    return limits.block * torch.get_num_threads() if x.device.type == "cpu" else max(1, x.numel())
