"""How ghosts lie over the ranks of a run, from the samples that each rank's micro-batch has."""

from collections.abc import Sequence

__all__ = ["describe", "falls_short", "ranks_that_fill_a_ghost"]


def ranks_that_fill_a_ghost(sizes: Sequence[int], ghost_batch_size: int, *, strided: bool = False) -> int:
    """Return into how many ranks a ghost must reach, 1 if none needs to or no equal share of the ranks fills it.

    Args:
        sizes: Samples of each rank's micro-batch, 0 where that is not known.
        ghost_batch_size: Samples of a ghost.
        strided: Whether the ranks of a part lie at equal distances, and not side by side.

    Example:
        >>> ranks_that_fill_a_ghost([32] * 8, 128)
        4
    """
    if min(sizes) >= ghost_batch_size or not all(sizes):
        return 1
    for size in range(2, len(sizes) + 1):
        parts, left_over = divmod(len(sizes), size)
        groups = [sizes[i::parts] if strided else sizes[i * size : (i + 1) * size] for i in range(parts)]
        if not left_over and all(sum(group) == ghost_batch_size for group in groups):
            return size
    return 1


def describe(sizes: Sequence[int], ghost_batch_size: int, ranks_per_ghost: int) -> str:
    """Return how the ghosts lie, in words.

    Args:
        sizes: Samples of each rank's micro-batch, 0 where that is not known.
        ghost_batch_size: Samples of a ghost.
        ranks_per_ghost: Ranks that share one.

    Example:
        >>> describe([80], 32, 1)
        '2 on each of 1 ranks, and one of 16 samples'
    """
    if ranks_per_ghost > 1:
        return f"{len(sizes) // ranks_per_ghost}, each over {ranks_per_ghost} ranks"
    if not all(sizes):
        return "within each rank's batch, whose size is not known: its tensors differ in their first dimension"
    full, rest = divmod(min(sizes), ghost_batch_size)
    if full == 0:
        return f"1 of {rest} samples on each of {len(sizes)} ranks"
    return f"{full} on each of {len(sizes)} ranks" + (f", and one of {rest} samples" if rest else "")


def falls_short(
    sizes: Sequence[int], ghost_batch_size: int, ranks_per_ghost: int, accumulate_grad_batches: int = 1
) -> str | None:
    """Return what is to be said where ghosts have other sizes than was asked for, or None.

    Args:
        sizes: Samples of each rank's micro-batch, 0 where that is not known.
        ghost_batch_size: Samples of a ghost.
        ranks_per_ghost: Ranks that share one.
        accumulate_grad_batches: Micro-batches of an update.

    Example:
        >>> falls_short([128, 128], 128, 1)
        >>> falls_short([32, 32], 128, 2)
        "ghosts over 2 ranks have 64 samples. Use micro-batches of 64, or ranks_per_ghost='auto'."
    """
    total, share, least = sum(sizes), len(sizes) // ranks_per_ghost, min(sizes)
    if not all(sizes):
        return None
    if ranks_per_ghost > 1:
        if total == share * ghost_batch_size:
            return None
        return (
            f"ghosts over {ranks_per_ghost} ranks have {total / share:g} samples. Use micro-batches of "
            f"{ghost_batch_size / ranks_per_ghost:g}, or ranks_per_ghost='auto'."
        )
    if least >= ghost_batch_size:
        return None
    return (
        f"a forward pass sees {least} samples ({len(sizes)} ranks, accumulate_grad_batches={accumulate_grad_batches}), "
        f"so each layer is plain batch normalization over these {least}: accumulation does not join micro-batches, and "
        f"no equal share of the ranks sees {ghost_batch_size} in all. Raise the loader's batch size to a multiple of "
        f"{ghost_batch_size}, or set ghost_batch_size={least}."
    )
