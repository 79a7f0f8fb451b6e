"""How ghosts lie over the ranks of a run, from the samples that each rank's micro-batch has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["GhostsOverRanks"]


@dataclass(frozen=True)
class GhostsOverRanks:
    """Which ranks share a ghost."""

    sizes: Sequence[int]  # samples of each rank's micro-batch, 0 where that is not known
    ghost_batch_size: int
    together: int = 1  # ranks that share one
    strided: bool = False  # whether these lie at equal distances, and not side by side

    @classmethod
    def of(
        cls, sizes: Sequence[int], ghost_batch_size: int, together: int | Literal["auto"], *, strided: bool = False
    ) -> "GhostsOverRanks":
        """Let a ghost reach into so many ranks; ``"auto"`` for as many as fill it, 1 if no equal share of them does."""
        if together == "auto":
            together = 1
            for size in range(2, len(sizes) + 1) if min(sizes) < ghost_batch_size and all(sizes) else ():
                parts, left_over = divmod(len(sizes), size)
                groups = [sizes[i::parts] if strided else sizes[i * size : (i + 1) * size] for i in range(parts)]
                if not left_over and all(sum(group) == ghost_batch_size for group in groups):
                    together = size
                    break
        return cls(sizes, ghost_batch_size, together, strided)

    @property
    def representatives(self) -> range:
        """One of the ranks of each ghost."""
        return range(len(self.sizes) // self.together) if self.strided else range(0, len(self.sizes), self.together)

    def describe(self) -> str:
        """Return how the ghosts lie, in words."""
        ranks = len(self.sizes)
        if self.together > 1:
            return f"{ranks // self.together}, each over {self.together} ranks"
        if not all(self.sizes):
            return "within each rank's batch, whose size is not known: its tensors differ in their first dimension"
        full, rest = divmod(min(self.sizes), self.ghost_batch_size)
        if full == 0:
            return f"1 of {rest} samples on each of {ranks} ranks"
        return f"{full} on each of {ranks} ranks" + (f", and one of {rest} samples" if rest else "")

    def falls_short(self, accumulate_grad_batches: int = 1) -> str | None:
        """Return what is to be said where ghosts have other sizes than was asked for, or None.

        Example:
            >>> GhostsOverRanks([128, 128], 128).falls_short()
            >>> GhostsOverRanks([32, 32], 128, 2).falls_short()
            "ghosts over 2 ranks have 64 samples. Use micro-batches of 64, or ranks_per_ghost='auto'."
        """
        wanted, total, share = self.ghost_batch_size, sum(self.sizes), len(self.sizes) // self.together
        least = min(self.sizes)
        if not all(self.sizes) or (total == share * wanted if self.together > 1 else least >= wanted):
            return None
        if self.together > 1:
            return (
                f"ghosts over {self.together} ranks have {total / share:g} samples. Use micro-batches of "
                f"{wanted / self.together:g}, or ranks_per_ghost='auto'."
            )
        return (
            f"a forward pass sees {least} samples ({len(self.sizes)} ranks, accumulate_grad_batches="
            f"{accumulate_grad_batches}), so each layer is plain batch normalization over these {least}: accumulation "
            f"does not join micro-batches, and no equal share of the ranks sees {wanted} in all. Raise the loader's "
            f"batch size to a multiple of {wanted}, or set ghost_batch_size={least}."
        )
