"""Tensors in the host's memory that say they are on cuda:0, and are held to that device's rules.

A :class:`Masked` is a wrapper whose device, as C++ sees it, is ``cuda:0``, around a CPU tensor. Every operation passes
:func:`dispatch`, which refuses what CUDA refuses, counts what is slow there, runs the operation on the CPU tensors, and
masks the results. What differs on the real device beyond that is replayed: TensorFloat-32, and kernels that use their
outputs as memory to work in.

It says nothing of speed, and of numerics nothing but that; it has one device, and neither ``data_ptr`` nor forward-mode
derivatives.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from counts import is_counting, note
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)

Operator = torch._ops.OpOverload
Named = dict[str, Any]

# The host needs their values, to know a shape or to answer.
_WAIT = {
    "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "bincount",
    "_unique2", "unique_dim", "unique_consecutive", "_linalg_check_errors", "linalg_matrix_rank",
    "_linalg_eigh", "_linalg_svd",
}  # fmt: skip
_INDEXING = {"index", "index_put_", "_index_put_impl_", "_unsafe_index"}
# They take tensors of several devices.
_ACROSS_DEVICES = {"copy_", "_to_copy", "set_"} | _INDEXING
# They refuse even a CPU tensor of no dimensions, which others take for a number.
_NO_CPU_SCALARS = {"addmv_", "mm", "bmm", "where_"}
_NO_KERNEL = {"_unsafe_view", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach"}
_MATRIX_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "addmv_", "dot"}

_missing: set[torch.dtype] = set()


@contextmanager
def without_double() -> Iterator[None]:
    """Refuse float64 on the device, as Apple's GPUs do."""
    _missing.add(torch.float64)
    try:
        yield
    finally:
        _missing.clear()


class Masked(Tensor):
    """A CPU tensor that says it is on cuda:0."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> "Masked":
        # An inference tensor could not be the view of another kind that some operations make of it.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            masked: Masked = Tensor._make_wrapper_subclass(
                cls,
                raw.shape,
                strides=raw.stride(),
                storage_offset=raw.storage_offset(),
                dtype=raw.dtype,
                layout=raw.layout,
                device=CUDA,
                requires_grad=False,
            )
        masked.raw = raw
        return masked

    @classmethod
    def __torch_dispatch__(
        cls, operator: Operator, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Named | None = None
    ) -> Any:
        return dispatch(operator, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Masked({self.raw!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            known: Tensor = memo[id(self)]
            return known
        with torch.no_grad():
            copied: Tensor = Masked(self.raw.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        else:
            copied.requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Files hold plain tensors, as if they were loaded with map_location="cpu".
        raw = self.raw.detach()
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(raw, self.requires_grad).__reduce_ex__(protocol)
        return raw.__reduce_ex__(protocol)


class MaskedDevice(TorchDispatchMode):
    """Sends all operations through :func:`dispatch`, those that make tensors too."""

    def __torch_dispatch__(
        self,
        operator: Operator,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Named | None = None,
    ) -> Any:
        return dispatch(operator, args, kwargs or {})


def dispatch(operator: Operator, args: tuple[Any, ...], kwargs: Named) -> Any:
    """Run an operation on the device, if it is one of the device's."""
    leaves = list(_leaves((*args, *kwargs.values())))
    masked = any(isinstance(leaf, Masked) for leaf in leaves)
    to_device = _is_cuda(kwargs.get("device"))
    if not masked and not to_device:
        return operator(*args, **kwargs)
    if torch.is_inference_mode_enabled():
        # There operations that are made of others come whole.
        made = operator.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
    name = operator._schema.name.partition("::")[2]
    _refuse(name, leaves, masked)
    to_host = name == "_to_copy" and kwargs.get("device") is not None and not to_device
    if is_counting():
        _count(name, operator, args, kwargs, masked, to_host)
    wrappers: dict[int, Masked] = {}
    result = _run(name, operator, _unmasked(args, wrappers), {k: _unmasked(v, wrappers) for k, v in kwargs.items()})
    return result if to_host else _masked(result, wrappers, name)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        else:
            yield value


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _refuse(name: str, leaves: list[Any], masked: bool) -> None:
    """Raise where CUDA would, in its words."""
    for leaf in leaves:
        if isinstance(leaf, torch.Generator) and leaf.device.type != "cuda":
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{leaf.device}' ({name})")
        if not masked or name in _ACROSS_DEVICES or not isinstance(leaf, Tensor) or isinstance(leaf, Masked):
            continue
        if leaf.dim() > 0 or name in _NO_CPU_SCALARS:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({name})"
            )


def _count(name: str, operator: Operator, args: tuple[Any, ...], kwargs: Named, masked: bool, to_host: bool) -> None:
    unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in _WAIT or unsized or (to_host and masked and not kwargs.get("non_blocking", False)):
        note("syncs", name)
    if name == "copy_":
        target, source, *rest = args
        on_device = isinstance(target, Masked), isinstance(source, Masked)
        if on_device == (False, True):
            in_flight = (any(rest) or kwargs.get("non_blocking", False)) and target.is_pinned()
            if not in_flight:
                note("syncs", name)
        elif on_device == (True, False):
            note("uploads", name)
    if name == "_to_copy" and not masked:
        note("uploads", name)
    if name in _INDEXING:
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                note("syncs", f"{name} of a mask")
            elif index is not None and not isinstance(index, Masked):
                note("uploads", f"{name} by CPU indices")
    if not operator.is_view and name not in _NO_KERNEL:
        note("launches", name)


def _run(name: str, operator: Operator, args: tuple[Any, ...], kwargs: Named) -> Any:
    """Return what the operation gives on the CPU."""
    if "pin_memory" in kwargs:
        kwargs["pin_memory"] = False
    if name in _MATRIX_PRODUCTS and _rounds_products():
        args = tuple(to_tensor_float_32(arg) if isinstance(arg, Tensor) else arg for arg in args)
    run = _native_batch_norm_out if name == "native_batch_norm" and operator._overloadname == "out" else operator
    return run(*args, **kwargs)


def _unmasked(value: Any, wrappers: dict[int, Masked]) -> Any:
    """Return what masks hide, and remember the masks by it."""
    if isinstance(value, Masked):
        wrappers[id(value.raw)] = value
        return value.raw
    if isinstance(value, list | tuple):
        return type(value)(_unmasked(part, wrappers) for part in value)
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def _masked(value: Any, wrappers: dict[int, Masked], name: str) -> Any:
    """Return results with masks, the old ones for arguments that were changed in place."""
    if isinstance(value, list | tuple):
        return type(value)(_masked(part, wrappers, name) for part in value)
    if not isinstance(value, Tensor) or isinstance(value, Masked):
        return value
    if id(value) in wrappers:
        known = wrappers[id(value)]
        if known.shape != value.shape or known.stride() != value.stride():
            with torch.no_grad():
                known.data = Masked(value)
        return known
    if value.dtype in _missing:
        raise TypeError(f"Cannot convert a MPS Tensor to {value.dtype} dtype as the MPS framework has none ({name})")
    return Masked(value)


# --- What differs on the real device -------------------------------------------------------------------------------


def _rounds_products() -> bool:
    return bool(torch._C._get_cublas_allow_tf32())


def to_tensor_float_32(t: Tensor) -> Tensor:
    """Return float32 numbers with ten bits of mantissa, rounded to nearest even: what tensor cores multiply."""
    if t.dtype != torch.float32:
        return t
    bits = t.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def _native_batch_norm_out(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, training: bool, momentum: float,
    eps: float, *, out: Tensor, save_mean: Tensor, save_invstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As on the CPU; but in evaluation ``batch_norm_cuda_out`` normalizes with what it has written to both buffers."""
    if training:
        normal: Callable[..., Any] = torch.ops.aten.native_batch_norm.out
        done: tuple[Tensor, Tensor, Tensor] = normal(
            x, weight, bias, mean, var, training, momentum, eps, out=out, save_mean=save_mean, save_invstd=save_invstd
        )
        return done
    for buffer in (save_mean, save_invstd):
        buffer.resize_(mean.shape)
    save_mean.copy_(mean)
    save_invstd.copy_((var + eps).rsqrt())
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    y = (x - save_mean.view(per_channel)) * save_invstd.view(per_channel)
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    out.copy_(y)
    return out, save_mean, save_invstd
