"""Which kind of differentiation is under way: kernels that write into given memory serve only the ordinary one."""

from torch import Tensor

from lightning_gap.trainer.internals.of_torch import is_batched, transforms_run

__all__ = ["looks_into_operations"]


def looks_into_operations(gradient: Tensor | None = None) -> bool:
    """Return whether transforms of ``torch.func`` run, or forward-mode differentiation, which follow each operation.

    Args:
        gradient: In a backward pass, the gradient that came: ``is_grads_batched`` and ``vectorize=True`` of
            ``torch.autograd`` give many at once.

    Example:
        >>> import torch
        >>> looks_into_operations(), torch.func.vmap(lambda _: looks_into_operations(), out_dims=None)(torch.ones(2))
        (False, True)
    """
    return transforms_run() or (gradient is not None and is_batched(gradient))
