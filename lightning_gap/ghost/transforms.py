"""Which kind of differentiation is under way: kernels that write into given memory serve only the ordinary one."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["looks_into_operations"]

# Of tensors that torch.autograd's own vmap, an older one than torch.func's, has batched.
_BATCHED = torch._C._dispatch_key_parse("Batched")


def looks_into_operations(gradient: Tensor | None = None) -> bool:
    """Return whether transforms of ``torch.func`` run, or forward-mode differentiation, which follow each operation.

    Args:
        gradient: In a backward pass, the gradient that came: ``is_grads_batched`` and ``vectorize=True`` of
            ``torch.autograd`` give many at once.

    Example:
        >>> looks_into_operations(), torch.func.vmap(lambda _: looks_into_operations(), out_dims=None)(torch.ones(2))
        (False, True)
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return gradient is not None and torch._C._dispatch_keys(gradient).has(_BATCHED)
