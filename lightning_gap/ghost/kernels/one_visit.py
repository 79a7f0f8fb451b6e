"""Ghosts on a CPU by compiled C++, which visits each once while it lies in a cache."""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from lightning_gap.ghost.kernels.layout import Kernel, Limits, Maybe, Run, Tables
from lightning_gap.native import native_argument, native_library

__all__ = ["ONE_VISIT", "one_visit_library", "takes_one_visit"]

_SOURCE = Path(__file__).with_name("one_visit.cpp")
# Elements for which a thread is worth its start; channels of a thread's part are whole groups of vectors.
_FEW, _CHANNELS = 1 << 17, 64
# Sums that the gradients of weight and bias are added up from.
_SUMS = 32
_NAMES = {torch.float32: "float", torch.float64: "double"}


@cache
def one_visit_library() -> ctypes.CDLL | None:
    """Return the compiled passes, or ``None`` where nothing compiles them; asked for once in a process."""
    return native_library(_SOURCE, {})


def takes_one_visit(x: Tensor, limits: Limits) -> bool:
    """Return whether a batch is of a kind and size for the compiled passes, and these are there."""
    kind = x.device.type == "cpu" and x.dtype in _NAMES
    return kind and x.numel() >= limits.one_visit and _is_there()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_there() -> bool:
    return one_visit_library() is not None


def _forward(
    run: Run, x: Tensor, y: Tensor, weight: Maybe, bias: Maybe, eps: float, tables: Tables, limits: Limits
) -> None:
    _over_parts("forward", run, 1, x, x, y, weight, bias, eps, *tables)


def _backward(run: Run, x: Tensor, grad_y: Tensor, weight: Maybe, tables: Tables, out: Maybe, limits: Limits) -> Tensor:
    together = -(-run.ghosts // _SUMS)
    sums = x.new_empty(2, -(-run.ghosts // together), x.shape[1], dtype=torch.float64)
    _over_parts("backward", run, together, x, x, grad_y, out, weight, tables.mean, tables.invstd, *sums)
    return sums.sum(1)


ONE_VISIT = Kernel(_forward, _backward)


def _over_parts(name: str, run: Run, together: int, x: Tensor, *arguments: Tensor | float | None) -> None:
    """Call a pass by as many threads as torch takes: numbers do not depend on how the ghosts are dealt out."""
    inside, samples, channels = x.dim() == 2, run.stop - run.start, x.shape[1]
    sample = x.numel() // samples
    if run.strided:
        pieces, length, step, apart = samples // run.ghosts, sample // channels, run.ghosts * sample, sample
    elif inside:
        pieces, length, step, apart = 1, len(x) // run.ghosts, 0, x.numel() // run.ghosts
    else:
        pieces, length, step, apart = samples // run.ghosts, x.shape[2], sample, x.numel() // run.ghosts
    call, pointers = _function(name, inside, x.dtype), [native_argument(argument) for argument in arguments]

    def work(part: tuple[int, int, int, int]) -> None:
        call((ctypes.c_long * 10)(pieces, length, step, apart, channels, *part, together), *pointers)

    workers = min(torch.get_num_threads(), -(-x.numel() // _FEW))
    if workers == 1:
        work((0, run.ghosts, 0, channels))
        return
    first, *others = _parts(workers, run.ghosts, together, channels)
    waiting = [_pool(os.getpid(), torch.get_num_threads()).submit(work, part) for part in others]
    work(first)
    for other in waiting:
        other.result()


def _parts(workers: int, ghosts: int, together: int, channels: int) -> list[tuple[int, int, int, int]]:
    """Return the ghosts and channels of each thread, from and to: ghosts whose sums are one stay together."""
    sums = -(-ghosts // together)
    if sums >= workers:
        bounds = [*(k * sums // workers * together for k in range(workers)), ghosts]
        return [(*pair, 0, channels) for pair in pairwise(bounds)]
    groups = channels // _CHANNELS
    workers = max(1, min(workers, groups))
    bounds = [*(k * groups // workers * _CHANNELS for k in range(workers)), channels]
    return [(0, ghosts, *pair) for pair in pairwise(bounds)]


@cache
def _function(name: str, inside: bool, dtype: torch.dtype) -> Callable[..., None]:
    function: Callable[..., None] = getattr(
        one_visit_library(), f"{name}_{'inside' if inside else 'outside'}_{_NAMES[dtype]}"
    )
    return function


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # Of this process: a fork has none of its threads.
    return ThreadPoolExecutor(threads - 1, f"ghosts of {process}")
