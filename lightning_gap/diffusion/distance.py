"""How far the weights have moved: ‖w_t − w_0‖, ‖w_t‖ and the angle between them.

Hoffer, Hubara, Soudry 2017, "Train longer, generalize better" (arXiv:1705.08741), section 3 and figure 2.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["WeightDisplacement", "tracked_parameters", "weight_displacement", "weight_norm"]

# Elements handled at once. On a CPU the temporary difference then stays in the cache, so that both copies are read
# from memory once; an accelerator needs larger pieces to be busy. Either way the temporary is small beside the model.
_CPU_PIECE = 1 << 16
_ACCELERATOR_PIECE = 1 << 24


class WeightDisplacement(NamedTuple):
    """Where the weights stand in relation to w_0.

    Attributes:
        distance: ‖w_t − w_0‖₂.
        relative_distance: ‖w_t − w_0‖₂ / ‖w_0‖₂; NaN where w_0 is zero.
        weight_norm: ‖w_t‖₂.
        cosine: ⟨w_t, w_0⟩ / (‖w_t‖₂ ‖w_0‖₂); NaN where either is zero or infinite.
    """

    distance: float
    relative_distance: float
    weight_norm: float
    cosine: float


def tracked_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, detached, by name; tied parameters once, under their first name.

    Args:
        module: Any module. Parameters with ``requires_grad=False`` and buffers are left out.

    Returns:
        Name -> the parameter itself, detached (no copy).

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> _ = layer.bias.requires_grad_(False)
        >>> list(tracked_parameters(layer))
        ['weight']
    """
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def weight_norm(weights: Mapping[str, Tensor]) -> float:
    """Return ‖w‖₂ over all tensors together.

    Args:
        weights: Name -> tensor of any shape, floating dtype and device.

    Example:
        >>> weight_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
        5.0
    """
    return math.sqrt(square_sums(weights, weights)[1])


def weight_displacement(
    weights: Mapping[str, Tensor], anchor: Mapping[str, Tensor], *, anchor_norm: float | None = None
) -> WeightDisplacement:
    """Return ‖w_t − w_0‖₂ and what follows from it, in one pass over both copies.

    Differences are taken in float32 (float64 for float64 weights). Squares are summed in pairs within pieces, and the
    pieces in float64: a plain float32 sum over ten million weights can be wrong in the fourth digit. The cosine follows
    from the three norms,
    ⟨w, a⟩ = (‖w‖² + ‖a‖² − ‖w − a‖²) / 2.

    Args:
        weights: w_t, name -> tensor.
        anchor: w_0, the same names and shapes, any device and floating dtype.
        anchor_norm: ‖w_0‖₂ if known already (:func:`weight_norm`), to spare computing it again.

    Raises:
        ValueError: Names or shapes differ.

    Example:
        >>> start, now = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 4.0])}
        >>> weight_displacement(now, start)
        WeightDisplacement(distance=3.0, relative_distance=0.6, weight_norm=4.0, cosine=0.8)
    """
    check_same_tensors(weights, anchor)
    if anchor_norm is None:
        anchor_norm = weight_norm(anchor)
    return displacement_from_squares(*square_sums(weights, anchor), anchor_norm)


def square_sums(
    weights: Mapping[str, Tensor], anchor: Mapping[str, Tensor], copies: Mapping[str, int] | None = None
) -> tuple[float, float]:
    """Return ‖w_t − w_0‖² and ‖w_t‖², each tensor's part divided by its number of copies on other ranks.

    Args:
        weights: w_t, or this rank's shards of it, name -> tensor.
        anchor: w_0, the same names and shapes.
        copies: How many ranks hold the same part, by name; 1 for all if None. Sums over ranks then count all once.
    """
    squares: dict[torch.device, list[Tensor]] = defaultdict(list)
    shares: dict[torch.device, list[float]] = defaultdict(list)
    for name, weight in weights.items():
        for now, start in _pieces(weight, anchor[name]):
            squares[now.device] += (_square_sum(now - start), _square_sum(now))
            shares[now.device].append(1 if copies is None else 1 / copies[name])
    distance2 = norm2 = 0.0
    for device, values in squares.items():  # the only wait for the device
        pairs = torch.stack(values).to("cpu", torch.float64).view(-1, 2)
        sums = torch.tensor(shares[device], dtype=torch.float64) @ pairs
        distance2, norm2 = distance2 + float(sums[0]), norm2 + float(sums[1])
    return distance2, norm2


def displacement_from_squares(distance2: float, norm2: float, anchor_norm: float) -> WeightDisplacement:
    """Return the displacement from ‖w_t − w_0‖², ‖w_t‖² and ‖w_0‖."""
    distance, norm = math.sqrt(distance2), math.sqrt(norm2)
    inner, scale = (norm2 + anchor_norm**2 - distance2) / 2, norm * anchor_norm
    return WeightDisplacement(
        distance=distance,
        relative_distance=distance / anchor_norm if anchor_norm > 0 else math.nan,
        weight_norm=norm,
        cosine=min(1.0, max(-1.0, inner / scale)) if 0 < scale < math.inf else math.nan,
    )


def check_same_tensors(weights: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` naming the tensors that are not in both, or not of one shape."""
    unmatched = sorted(weights.keys() ^ anchor.keys())
    if unmatched:
        raise ValueError(f"weights and anchor must have the same names; in one of them only: {_shortened(unmatched)}")
    reshaped = [name for name, weight in weights.items() if weight.shape != anchor[name].shape]
    if reshaped:
        raise ValueError(f"weights and anchor must have the same shapes; they differ for {_shortened(reshaped)}")


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _piece(tensor: Tensor) -> int:
    return _CPU_PIECE if tensor.device.type == "cpu" else _ACCELERATOR_PIECE


def _flat(tensor: Tensor, layout: Tensor) -> Tensor:
    """Flatten in the memory order of ``layout``, which is a view for channels-last weights too."""
    if layout.is_complex():
        tensor, layout = torch.view_as_real(tensor), torch.view_as_real(layout)
    return tensor.permute(sorted(range(layout.ndim), key=layout.stride, reverse=True)).reshape(-1)


def _pieces(weight: Tensor, anchor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    # The difference of two bfloat16 is not a bfloat16.
    dtype = torch.float64 if weight.dtype in (torch.float64, torch.complex128) else torch.float32
    size = _piece(weight)
    pieces = zip(torch.split(_flat(weight, weight), size), torch.split(_flat(anchor, weight), size), strict=True)
    for now, start in pieces:
        yield now.to(dtype), start.to(now.device, dtype)


def _square_sum(flat: Tensor) -> Tensor:
    return flat.square().sum()  # `sum` adds in pairs; `dot` and `vector_norm` lose digits on a CPU
