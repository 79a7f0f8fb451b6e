"""Private names of torch, a function each, and the operators of ATen whose semantics are assumed."""

import inspect
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_gap.trainer.internals.guard import PrivateNameGoneError, bound, private

try:
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
    from torch.utils._pytree import tree_leaves, tree_map
except ImportError as error:
    raise PrivateNameGoneError(torch, str(error.name), "torch") from error

__all__ = [
    "METADATA_LAYOUT",
    "METADATA_STORAGE",
    "MODULE_TABLES",
    "SCHEDULER_MILESTONES",
    "SCHEDULER_RATES",
    "BatchNormBase",
    "apply_to_module",
    "assert_async",
    "check_input_dim",
    "distances_backward",
    "ema_decay",
    "group_timeout",
    "is_batched",
    "is_compiled",
    "is_wrapped_by_transform",
    "loss_scale_without_waiting",
    "native_batch_norm_backward",
    "native_batch_norm_out",
    "parts_of_scheduler",
    "set_ema_decay",
    "squared_differences_backward_out",
    "squared_differences_out",
    "times_written",
    "transforms_run",
    "tree_leaves",
    "tree_map",
    "unscales_in_step",
    "version_of",
]

_TORCH = "torch"
# The tables of a module that hold its parameters and its parts.
MODULE_TABLES = ("_parameters", "_modules")
# Learning rates, and lengths, of torch's schedulers under private names.
SCHEDULER_RATES = ("_last_lr",)
SCHEDULER_MILESTONES = ("_milestones",)
# What the metadata of a distributed checkpoint name, of torch.serialization and of its file system.
METADATA_LAYOUT = "_get_layout"
METADATA_STORAGE = "_StorageInfo"

# A condition on a device that ends the process if it is false, without waiting for it here: (condition, message).
assert_async = bound(torch, "_assert_async", _TORCH)
# Whether a tensor is seen through a transform of torch.func.
is_wrapped_by_transform = bound(getattr(torch._C, "_functorch", torch._C), "is_functorch_wrapped_tensor", _TORCH)
# The gradient of a matrix of Euclidean distances: (gradient, x, y, 2.0, distances), 0 at distance 0.
distances_backward = bound(torch.ops.aten, "_cdist_backward", _TORCH)

# Written into given memory, with out=, save_mean= and save_invstd=. In training with momentum 1 the running statistics
# become the batch's mean and unbiased variance, and save_invstd holds 1/√(σ² + ε) with the biased one; in evaluation
# it is (x − mean)/√(var + ε) times the weight and the bias.
native_batch_norm_out = bound(torch.ops.aten.native_batch_norm, "out", _TORCH)
# Gradients of x, weight and bias by the saved statistics of training.
native_batch_norm_backward = bound(torch.ops.aten, "native_batch_norm_backward", _TORCH)
# Without reduction, 0: (a − b)² in one pass, and its gradient, twice (a − b)·grad.
squared_differences_out = bound(torch.ops.aten.mse_loss, "out", _TORCH)
squared_differences_backward_out = bound(torch.ops.aten.mse_loss_backward, "grad_input", _TORCH)

_transforms_active = bound(torch._C, "_are_functorch_transforms_active", _TORCH)
_dispatch_keys = bound(torch._C, "_dispatch_keys", _TORCH)
# Of tensors that torch.autograd's own vmap, an older one than torch.func's, has batched.
_BATCHED = bound(torch._C, "_dispatch_key_parse", _TORCH)("Batched")


def transforms_run() -> bool:
    """Return whether transforms of ``torch.func`` run, or forward-mode differentiation."""
    return bool(_transforms_active() or forward_ad._current_level >= 0)


def is_batched(tensor: Tensor) -> bool:
    """Return whether ``is_grads_batched`` or ``vectorize=True`` of ``torch.autograd`` gave many gradients at once."""
    return bool(_dispatch_keys(tensor).has(_BATCHED))


def is_compiled(module: Any) -> bool:
    """Return whether ``torch.compile``, or a module's own ``compile``, has compiled it."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written to; tensors of inference mode do not tell."""
    return int(private(tensor, "_version", _TORCH))


def check_input_dim(layer: Any, input: Tensor) -> None:
    """Refuse an input of other dimensions than a BatchNorm layer takes, in torch's words."""
    private(layer, "_check_input_dim", _TORCH)(input)


def apply_to_module(module: Any, fn: Any) -> None:
    """Apply a function to all parameters and buffers of a module, as ``module.to`` does."""
    private(module, "_apply", _TORCH)(fn)


def parts_of_scheduler(scheduler: Any) -> list[Any]:
    """Return the schedulers that a ``SequentialLR`` or ``ChainedScheduler`` is composed of."""
    return list(private(scheduler, "_schedulers", _TORCH))


def group_timeout(group: Any) -> timedelta | None:
    """Return how long a process group waits, ``None`` where its backends do not say so."""
    devices = private(group, "_device_types", _TORCH)
    backend = private(group, "_get_backend", _TORCH)
    options = (getattr(backend(device), "options", None) for device in devices)
    return max((known for each in options if (known := getattr(each, "_timeout", None))), default=None)


def loss_scale_without_waiting(scaler: Any) -> Tensor | None:
    """Return a gradient scaler's factor on its device; ``None`` before its first loss, or where it has no such way."""
    scale: Tensor | None = getattr(scaler, "_get_scale_async", lambda: None)()
    return scale


def unscales_in_step(optimizer: Any) -> bool:
    """Return whether an optimizer, a fused one, takes the loss scale off its gradients inside its step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


# Where an ``AveragedModel`` keeps how it averages, and what torch itself makes of a decay for that.
_AVERAGES: dict[str, Any] = {"avg_fn": get_ema_avg_fn, "multi_avg_fn": get_ema_multi_avg_fn}


def ema_decay(model: Any) -> float | None:
    """Return the decay of an ``AveragedModel`` that averages by torch's moving average; else ``None``."""
    for name in _AVERAGES:
        function = getattr(model, name, None)
        if callable(function) and function.__module__ == get_ema_avg_fn.__module__:
            decay = inspect.getclosurevars(inspect.unwrap(function)).nonlocals.get("decay")
            return None if decay is None else float(decay)
    return None


def set_ema_decay(model: Any, decay: float) -> None:
    """Let an ``AveragedModel`` average by torch's moving average of another decay."""
    for name, make in _AVERAGES.items():
        if getattr(model, name, None) is not None:
            setattr(model, name, make(decay))


def times_written(tensor: torch.Tensor) -> int:
    """Return a number that changes with each write to a tensor in place, without waiting for its device."""
    return int(private(tensor, "_version", "torch"))
