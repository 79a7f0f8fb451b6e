"""The weights that a run started with, w_0, and how far from them others are."""

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import fsspec
import torch
from torch import Tensor, nn

from lightning_gap.diffusion.distance import (
    ParameterFilter,
    WeightDisplacement,
    check_same_tensors,
    displacement_from_squares,
    holds_values,
    layer_of,
    matches,
    present_parameters,
    square_sums,
)
from lightning_gap.precision import widest
from lightning_gap.ranks.group import sum_over_ranks
from lightning_gap.ranks.shards import load_shards, local_shard, save_shards, shard_copies, shard_like

__all__ = ["Anchor", "folder_of_shards", "weights_of"]


class Anchor:
    """A copy of the weights w_0, or of this rank's shards of them, and of how they are measured.

    ``sharded``: ranks hold parts, and everything is collective. ``dtype``: half precision, where that is narrower than
    the weights'. ``groups``, and with ``per_layer`` each module that owns tensors, are measured by themselves too.
    Raises ``ValueError`` without weights, or where they are too large for ``dtype``, or a group has none.

    Example:
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> anchor = Anchor(present_parameters(layer))
        >>> with torch.no_grad():
        ...     _ = layer.weight.add_(0.5)
        >>> anchor.displacement(anchor.squares(present_parameters(layer))).distance
        1.0
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        *,
        sharded: bool = False,
        device: torch.device | None = None,
        dtype: str | None = None,
        groups: Mapping[str, ParameterFilter] | None = None,
        per_layer: bool = False,
    ) -> None:
        if not start:
            raise ValueError(
                "found no parameter with requires_grad=True that is not excluded: unfreeze some before training "
                "starts, exclude less, or remove the callback."
            )
        self.groups = _rows_of_groups(start, groups or {}, per_layer)
        self.weights = {name: _copy(local_shard(tensor), device, dtype) for name, tensor in start.items()}
        self.shapes = {name: list(tensor.shape) for name, tensor in start.items()}
        self.sharded = sharded
        self.folder: str | None = None  # where the shards have been written
        # ‖w_0 − copy‖², which is zero unless rounded, and ‖w_0‖², a row for each tensor.
        self.start_squares = self.squares(start)
        if not self.start_squares[:, 0].isfinite().all() and self.start_squares[:, 1].isfinite().all():
            raise ValueError(
                f"anchor_dtype={dtype!r} cannot hold the initial weights, some are too large: use 'bfloat16' or None."
            )

    @classmethod
    def resumed(
        cls, state: Mapping[str, Any], weights: Mapping[str, Tensor], folder: str | None = None, **options: Any
    ) -> "Anchor":
        """Return the anchor of a state, in the shards of the model's weights. Collective."""
        if folder is None:
            start = {name: shard_like(state["anchor"][name], weight) for name, weight in weights.items()}
        else:
            start = load_shards(weights, folder)
        anchor = cls(start, **options)
        rounding = anchor.start_squares[:, 0]
        anchor.start_squares = state["start_squares"].clone()
        if folder is None:  # may have been rounded before, and rounded again now
            rounding = anchor.start_squares[:, 0] + rounding
        anchor.start_squares[:, 0] = rounding
        anchor.folder = folder
        return anchor

    def state_dict(self) -> dict[str, Any]:
        """Return the anchor, or the name of its folder, for a checkpoint."""
        return {
            "anchor": None if self.folder else self.weights,
            "anchor_folder": self.folder,
            "shapes": dict(self.shapes),
            "start_squares": self.start_squares,
        }

    def write(self, weights: Mapping[str, Tensor], folder: str) -> None:
        """Write the initial weights into a folder that states name from now on. Collective."""
        save_shards(weights, folder)
        self.folder = folder

    def squares(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return ‖w − w_0‖² and ‖w‖² of every tensor, which must be the anchor's: (tensors, 2), over all ranks."""
        local = {name: local_shard(weights[name]) for name in self.weights if name in weights}
        check_same_tensors(local, self.weights)
        sums = square_sums(local, self.weights)
        if not self.sharded:
            return sums
        copies = [shard_copies(weights[name]) for name in self.weights]
        share = sums / torch.tensor(copies, dtype=torch.float64, device="cpu")[:, None]
        device = next(iter(local.values())).device
        return sum_over_ranks(share.to(widest(device)).to(device)).cpu().double()

    def tracked_in(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the module's parameters that have a w_0."""
        return {name: p.detach() for name, p in module.named_parameters() if name in self.weights}

    def displacement(self, squares: Tensor, rows: Tensor | slice = slice(None)) -> WeightDisplacement:
        """Return the displacement of all tensors, or of a group, from what :meth:`squares` returned."""
        rounding, start2 = self.start_squares[rows].sum(0)
        distance2, norm2 = squares[rows].sum(0)
        return displacement_from_squares(
            float((distance2 - rounding).clamp(min=0)), float(norm2), math.sqrt(float(start2))
        )

    def astray(self, squares: Tensor) -> str:
        """Return in words which tensors hold NaN or infinite numbers."""
        names = [name for name, fine in zip(self.weights, squares.isfinite().all(1).tolist(), strict=True) if not fine]
        return f"{len(names)} of {len(self.weights)} parameters are no finite numbers ({names[0]}, ...)"

    def added(self, module: nn.Module, exclude: ParameterFilter | None) -> list[str]:
        """Return the names of the parameters that are trained now and have no w_0."""
        return [name for name in present_parameters(module, exclude=exclude) if name not in self.weights]

    @property
    def parameters(self) -> int:
        """How many numbers are measured."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def weights_of(
    module: nn.Module, shapes: Mapping[str, Sequence[int]], exclude: ParameterFilter | None = None
) -> dict[str, Tensor]:
    """Return a module's weights of an anchor, or raise ``ValueError`` where not all are there, in their shapes."""
    named = {name: p.detach() for name, p in module.named_parameters() if holds_values(p)}
    gone = [name for name in shapes if name not in named]
    reshaped = [name for name in shapes if name in named and list(named[name].shape) != list(shapes[name])]
    out = [name for name in shapes if exclude and name in named and matches(exclude, name, named[name])]
    for names, what in ((gone, "is not in the model"), (reshaped, "has another shape"), (out, "is excluded now")):
        if names:
            raise ValueError(
                f"the initial weights are those of another model: {names[0]} {what}. Resume with the same model and "
                "the same `exclude`, or remove the callback."
            )
    return {name: named[name] for name in shapes}


def folder_of_shards(folder: str, checkpoint: Any) -> str:
    """Return the anchor's folder where it was written, or beside the checkpoint if that was moved."""
    beside = PurePath(str(checkpoint)).parent / PurePath(folder).name
    for place in (folder, str(beside)):
        filesystem, path = fsspec.core.url_to_fs(place)
        if filesystem.exists(path):
            return place
    raise ValueError(
        f"the initial weights are neither in {folder} nor in {beside}: put the folder beside the checkpoint, or "
        "remove the callback."
    )


def _rows_of_groups(
    weights: Mapping[str, Tensor], groups: Mapping[str, ParameterFilter], per_layer: bool
) -> dict[str, Tensor]:
    members = {
        group: [row for row, (name, weight) in enumerate(weights.items()) if matches(which, name, weight)]
        for group, which in groups.items()
    }
    if empty := [group for group, rows in members.items() if not rows]:
        raise ValueError(
            f"groups[{empty[0]!r}] matches no tracked parameter; they are named {', '.join(list(weights)[:5])}, ..."
        )
    layers: dict[str, list[int]] = {}
    for row, name in enumerate(weights if per_layer else ()):
        layers.setdefault(layer_of(name), []).append(row)
    if both := sorted(layers.keys() & members.keys()):
        raise ValueError(f"{both[0]!r} is the name of a layer and one of `groups`: rename the group.")
    return {group: torch.tensor(rows, device="cpu") for group, rows in (members | layers).items()}


def _copy(tensor: Tensor, device: torch.device | None, dtype: str | None) -> Tensor:
    wanted = tensor.dtype if dtype is None else getattr(torch, dtype)
    if not tensor.is_floating_point() or wanted.itemsize >= tensor.dtype.itemsize:
        wanted = tensor.dtype
    return tensor.to(device or tensor.device, wanted, copy=True)
