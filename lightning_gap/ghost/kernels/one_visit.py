"""Ghosts on a CPU by compiled C++, which visits each once while it lies in a cache."""

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_gap.ghost.kernels import layout
from lightning_gap.ghost.kernels.layout import Kernel, Limits, Maybe, Run, Tables
from lightning_gap.native import native_library

__all__ = ["ONE_VISIT", "average_natively", "has_memory", "one_visit_library", "takes_one_visit"]

_SOURCE = Path(__file__).with_name("one_visit.cpp")
# Elements for which a thread is worth its start.
_FEW = 1 << 17
_NAMES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Of a call: pieces, length, step, apart, channels, ghosts, threads; x, dy, result, weight, bias, tables, sums; epsilon.
_CALL = struct.Struct("@7l9Pd")
# What averages statistics in a format, once a library is there.
_AVERAGE: dict[torch.dtype, Callable[..., None]] = {}


@cache
def one_visit_library(dtype: torch.dtype, inside: bool) -> ctypes.CDLL | None:
    """Return the passes for a format of samples and where channels lie, or ``None`` where nothing compiles them.

    It is asked for once in a process: each is compiled on its first use, in about two seconds.
    """
    library = native_library(_SOURCE, {"SAMPLES": _NAMES[dtype], "INSIDE": str(int(inside))})
    if library is None:
        return None
    for call in (library.forward, library.backward):
        call.argtypes, call.restype = [ctypes.c_char_p], None
    average, pointer, long = library.average, ctypes.c_void_p, ctypes.c_long
    average.argtypes, average.restype = [pointer, pointer, long, long, ctypes.c_double, pointer, pointer], None
    _AVERAGE.setdefault(torch.float64 if dtype == torch.float64 else torch.float32, average)
    return library


def takes_one_visit(x: Tensor, limits: Limits) -> bool:
    """Return whether a batch is of a kind and size for the compiled passes, and these are there."""
    kind = x.device.type == "cpu" and x.dtype in _NAMES
    return kind and x.numel() >= limits.one_visit and _is_there(x.dtype, x.dim() == 2 or layout.channels_inside(x))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_there(dtype: torch.dtype, inside: bool) -> bool:
    return one_visit_library(dtype, inside) is not None


def has_memory(t: Tensor) -> bool:
    """Return whether a tensor's numbers are where it says: those of classes that dispatch by themselves are not."""
    return type(t).__torch_dispatch__ is Tensor.__torch_dispatch__


def _forward(
    run: Run, x: Tensor, y: Tensor, weight: Maybe, bias: Maybe, eps: float, tables: Tables, limits: Limits
) -> None:
    _call("forward", run, x, None, y, weight, bias, tables, None, eps)


def _backward(run: Run, x: Tensor, grad_y: Tensor, weight: Maybe, tables: Tables, out: Maybe, limits: Limits) -> Tensor:
    sums = tables.mean.new_empty(2, x.shape[1])
    _call("backward", run, x, grad_y, out, weight, None, tables, sums, 0.0)
    return sums


ONE_VISIT = Kernel(_forward, _backward)


def _call(
    name: str, run: Run, x: Tensor, grad_y: Maybe, out: Maybe, weight: Maybe, bias: Maybe, tables: Tables, sums: Maybe,
    eps: float,
) -> None:  # fmt: skip
    """Call a pass by as many threads as torch takes: numbers do not depend on how the ghosts are dealt out."""
    start, stop, ghosts, strided = run
    shape, numbers = x.shape, x.numel()
    inside, channels, sample = len(shape) == 2, shape[1], numbers // (stop - start)
    if strided:
        pieces, length, step, apart = (stop - start) // ghosts, sample // channels, ghosts * sample, sample
    elif inside:
        pieces, length, step, apart = 1, shape[0] // ghosts, 0, numbers // ghosts
    else:
        pieces, length, step, apart = (stop - start) // ghosts, shape[2], sample, numbers // ghosts
    threads = 1 if numbers <= _FEW else min(torch.get_num_threads(), -(-numbers // _FEW))
    mean, var, invstd = tables
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    _function(name, x.dtype, inside)(
        _CALL.pack(
            pieces, length, step, apart, channels, ghosts, threads,
            x.data_ptr(),
            0 if grad_y is None else grad_y.data_ptr(),
            0 if out is None else out.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            mean.data_ptr(), var.data_ptr(), invstd.data_ptr(),
            0 if sums is None else sums.data_ptr(),
            eps,
        )
    )  # fmt: skip


@cache
def _function(name: str, dtype: torch.dtype, inside: bool) -> Callable[[bytes], None]:
    function: Callable[[bytes], None] = getattr(one_visit_library(dtype, inside), name)
    return function


def average_natively(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, keep: float) -> bool:
    """Average (ghosts, C) into running statistics, which keep a share at each; return whether that was done."""
    average, shape = _AVERAGE.get(mean.dtype), mean.shape[1:]
    if average is None or not (mean.is_cpu and mean.is_contiguous() and var.is_contiguous() and has_memory(mean)):
        return False
    for running in (running_mean, running_var):
        if running.dtype != mean.dtype or running.shape != shape or not running.is_cpu or not running.is_contiguous():
            return False
        if running.requires_grad or running.is_inference() or not has_memory(running):
            return False
    average(mean.data_ptr(), var.data_ptr(), *mean.shape, keep, running_mean.data_ptr(), running_var.data_ptr())
    torch.autograd.graph.increment_version((running_mean, running_var))
    return True
