"""Memory and threads: what is kept from one call to the next, and how much is free."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import local
from typing import Any

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from lightning_gap.monge.ot.limits import LIMITS

__all__ = ["blas_threads", "buffers", "fits", "free_memory", "needed", "thread_count", "threads"]

# Memory kept from one call to the next, for each thread: fresh pages cost more than the work on them.
_KEPT_BYTES = 1 << 28
# A matrix up to this size takes one thread: waking others costs more than they do of so short an operation, and
# milliseconds where another process has their cores.
_ONE_THREAD_NUMBERS = 1 << 20


class _Pool(local):
    def __init__(self) -> None:
        self.free: list[Tensor] = []


_POOL = _Pool()


@contextmanager
def buffers(count: int, n: int, m: int, like: Tensor) -> Iterator[list[Tensor]]:
    """Lend ``count`` uninitialized ``(n, m)`` matrices; on a CPU from memory that this thread used before."""
    pool = _POOL.free if like.device.type == "cpu" else []
    taken = []
    for _ in range(count):
        fitting = [t for t in pool if t.dtype == like.dtype and t.numel() >= n * m]
        if fitting:
            flat = min(fitting, key=Tensor.numel)
            pool[:] = [t for t in pool if t is not flat]
        else:
            # Outside of inference mode, or training could not write to it later.
            with torch.inference_mode(False):
                flat = torch.empty(n * m, dtype=like.dtype, device=like.device)
        taken.append(flat)
    try:
        yield [flat[: n * m].view(n, m) for flat in taken]
    finally:
        for flat in taken:
            if sum(t.nbytes for t in pool) + flat.nbytes > _KEPT_BYTES:
                pool.clear()
            if flat.nbytes <= _KEPT_BYTES // 2:
                pool.append(flat)


@cache
def _blas() -> list[Any]:
    """NumPy's and SciPy's BLAS, as threadpoolctl's controllers; its context costs as much as a small solve's sweep."""
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Let NumPy's BLAS take so many threads."""
    before = [library.get_num_threads() for library in _blas()]
    for library in _blas():
        library.set_num_threads(count)
    try:
        yield
    finally:
        for library, threads_before in zip(_blas(), before, strict=True):
            library.set_num_threads(threads_before)


def thread_count(numbers: int) -> int:
    """Return how many threads a matrix of so many numbers takes: one if small, as many as torch has if large."""
    return 1 if numbers <= _ONE_THREAD_NUMBERS else torch.get_num_threads()


@contextmanager
def threads(numbers: int) -> Iterator[None]:
    """Let torch and NumPy's BLAS take one thread for small matrices, and as many as torch has for large ones."""
    before = torch.get_num_threads()
    count = thread_count(numbers)
    if count != before:
        torch.set_num_threads(count)
    try:
        with blas_threads(count):
            yield
    finally:
        if count != before:
            torch.set_num_threads(before)


def needed(x: Tensor, y: Tensor) -> int:
    """Return the bytes of the dense solver's matrices."""
    return 2 * len(x) * len(y) * x.element_size()


def fits(x: Tensor, y: Tensor) -> bool:
    """Return whether there is memory for the dense solver's matrices."""
    return needed(x, y) <= LIMITS.small_bytes or needed(x, y) <= free_memory(x)


def free_memory(like: Tensor) -> float:
    """Return the bytes that are free where a tensor is; infinity where nobody knows."""
    if like.device.type == "cuda":
        # What torch holds and nobody uses is as good as free.
        held = torch.cuda.memory_reserved(like.device) - torch.cuda.memory_allocated(like.device)
        return float(torch.cuda.mem_get_info(like.device)[0] + held)
    try:
        with open("/proc/meminfo") as lines:
            kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
        return 1024 * float(kilobytes)
    except (OSError, StopIteration):
        return math.inf
