"""How far the weights have moved: ‖w_t − w_0‖, ‖w_t‖ and the angle between them.

Hoffer, Hubara, Soudry 2017, "Train longer, generalize better" (arXiv:1705.08741), section 3 and figure 2.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

__all__ = [
    "ParameterFilter",
    "WeightDisplacement",
    "check_filter",
    "holds_values",
    "layer_of",
    "matches",
    "norms_and_biases",
    "present_parameters",
    "tracked_parameters",
    "weight_displacement",
    "weight_norm",
]

# Squares that a single-precision sum may add: equal ones, as Adam's first step makes them, all round the same way.
_ROW = 1 << 11

Scratch = dict[torch.dtype, Tensor]

# Which parameters: a regular expression searched for in the name, or a function of name and parameter.
ParameterFilter = str | Callable[[str, Tensor], bool]


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


def tracked_parameters(module: nn.Module, *, exclude: ParameterFilter | None = None) -> dict[str, Tensor]:
    """Return the parameters that are trained, detached, by name; tied parameters once, under their first name.

    Args:
        module: Any module. Parameters with ``requires_grad=False`` and buffers are left out.
        exclude: What else is left out: a regular expression searched for in the name, or a function of name and
            parameter, as :func:`norms_and_biases`.

    Returns:
        Name -> the parameter itself, detached (no copy).

    Raises:
        ValueError: A parameter has no values yet: a lazy module's before its first batch, or one on the meta device.

    Example:
        >>> layer = torch.nn.Linear(2, 3)
        >>> list(tracked_parameters(layer, exclude="bias$"))
        ['weight']
    """
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad and not holds_values(p)]
    if empty := [name for name, _ in trained if not (isinstance(exclude, str) and re.search(exclude, name))]:
        raise ValueError(
            f"parameters have no values yet: {_shortened(empty)}. Run a batch through the module if it is lazy, "
            "materialize it if it is on the meta device, or exclude them by name."
        )
    return present_parameters(module, exclude=exclude)


def present_parameters(module: nn.Module, *, exclude: ParameterFilter | None = None) -> dict[str, Tensor]:
    """Return what :func:`tracked_parameters` does, without the parameters that have no values yet."""
    named = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad and holds_values(p)}
    return {name: p for name, p in named.items() if exclude is None or not matches(exclude, name, p)}


def holds_values(parameter: Tensor) -> bool:
    """Return whether a parameter can be read: not of a lazy module before its first batch, nor on the meta device."""
    return not is_lazy(parameter) and not parameter.is_meta


def norms_and_biases(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter is a vector or a scalar, as all of normalization layers and all biases are.

    Example:
        >>> list(tracked_parameters(torch.nn.Linear(2, 3), exclude=norms_and_biases))
        ['weight']
    """
    return parameter.ndim <= 1


def matches(which: ParameterFilter, name: str, parameter: Tensor) -> bool:
    """Return whether ``which`` means this parameter."""
    return re.search(which, name) is not None if isinstance(which, str) else bool(which(name, parameter))


def check_filter(argument: str, which: object) -> None:
    """Raise ``ValueError`` unless ``which`` is a regular expression or a function."""
    if isinstance(which, str):
        try:
            re.compile(which)
        except re.error as error:
            raise ValueError(f"{argument}={which!r} is not a regular expression: {error}") from error
    elif not callable(which):
        raise ValueError(f"{argument} must be a regular expression or a function (name, parameter), got {which!r}")


def layer_of(name: str) -> str:
    """Return the name of the module that owns a parameter; ``"."`` for the module itself."""
    return name.rpartition(".")[0] or "."


def weight_norm(weights: Mapping[str, Tensor]) -> float:
    """Return ‖w‖₂ over all tensors together.

    Args:
        weights: Name -> tensor of any shape, floating dtype and device.

    Example:
        >>> weight_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
        5.0
    """
    return math.sqrt(float(square_sums(weights, weights)[:, 1].sum()))


def weight_displacement(
    weights: Mapping[str, Tensor], anchor: Mapping[str, Tensor], *, anchor_norm: float | None = None
) -> WeightDisplacement:
    """Return ‖w_t − w_0‖₂ and what follows from it, in one pass over both copies.

    Differences are taken in float32 (float64 for float64 weights). Squares are summed within pieces, and the pieces in
    float64: a plain float32 sum over ten million weights can be wrong in the fourth digit. The cosine follows from the
    three norms, ⟨w, a⟩ = (‖w‖² + ‖a‖² − ‖w − a‖²) / 2.

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
    distance2, norm2 = square_sums(weights, anchor).sum(0).tolist()
    return displacement_from_squares(distance2, norm2, anchor_norm)


def square_sums(
    weights: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    cpu_piece: int = 1 << 17,
    accelerator_piece: int = 1 << 22,
) -> Tensor:
    """Return ‖w_t − w_0‖² and ‖w_t‖² of each tensor: (tensors, 2), float64, on the CPU."""
    # The difference of a piece stays in a CPU's second-level cache, so that both copies are read from memory once; an
    # accelerator needs larger pieces to be busy. Either way it is small beside the model.
    sums: list[tuple[float, float]] = []
    waiting: dict[torch.device, list[tuple[int, Tensor]]] = {}
    scratch: Scratch = {}
    for row, (name, weight) in enumerate(weights.items()):
        now, start = _flat(weight, weight), _flat(anchor[name], weight)
        # The difference of two bfloat16 is not a bfloat16.
        dtype = torch.float64 if now.dtype == torch.float64 else torch.float32
        if now.device.type == "cpu":
            sums.append(_cpu_square_sums(now, start, dtype, scratch, cpu_piece))
            continue
        sums.append((0.0, 0.0))
        for w, a in zip(now.split(accelerator_piece), start.split(accelerator_piece), strict=True):
            w, a = w.to(dtype), a.to(w.device, non_blocking=True).to(dtype)
            norms = torch.stack([torch.linalg.vector_norm(w - a), torch.linalg.vector_norm(w)])
            waiting.setdefault(w.device, []).append((row, norms))
    total = torch.tensor(sums, dtype=torch.float64, device="cpu").reshape(-1, 2)
    for pieces in waiting.values():  # the only wait for the device
        rows = torch.tensor([row for row, _ in pieces], device="cpu")
        total.index_add_(0, rows, torch.stack([norms for _, norms in pieces]).cpu().double().square())
    return total


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


def _flat(tensor: Tensor, layout: Tensor) -> Tensor:
    """Flatten in the memory order of ``layout``, which is a view for channels-last weights too."""
    if layout.is_complex():
        tensor, layout = torch.view_as_real(tensor), torch.view_as_real(layout)
    if layout.is_contiguous():
        return tensor.reshape(-1)
    return tensor.permute(sorted(range(layout.ndim), key=layout.stride, reverse=True)).reshape(-1)


def _cpu_square_sums(
    now: Tensor, start: Tensor, dtype: torch.dtype, scratch: Scratch, piece: int
) -> tuple[float, float]:
    """‖now − start‖² and ‖now‖² of vectors, by NumPy, whose calls cost less than torch's."""
    if dtype not in scratch:
        # New memory for each piece would cost page faults.
        scratch[dtype] = torch.empty(3, piece, dtype=dtype, device="cpu")
    difference = scratch[dtype][2].numpy()
    distance2 = norm2 = 0.0
    for first in range(0, len(now), piece):
        w, a = (
            _as_numpy(vector[first : first + piece], buffer)
            for vector, buffer in zip((now, start), scratch[dtype], strict=False)
        )
        moved = np.subtract(w, a, out=difference[: len(w)])
        distance2 += _square_sum(moved)
        norm2 += _square_sum(w)
    return distance2, norm2


def _as_numpy(vector: Tensor, buffer: Tensor) -> NDArray[Any]:
    """A CPU tensor of the buffer's dtype itself, anything else copied into the buffer."""
    own = vector.dtype == buffer.dtype and vector.device.type == "cpu"
    array: NDArray[Any] = (vector if own else buffer[: len(vector)].copy_(vector)).numpy()
    return array


def _square_sum(vector: NDArray[Any]) -> float:
    whole = len(vector) // _ROW * _ROW
    rest = vector[whole:]
    total = float(np.dot(rest, rest))
    if whole:
        rows = vector[:whole].reshape(-1, 1, _ROW)
        total += float(np.matmul(rows, rows.transpose(0, 2, 1)).sum(dtype=np.float64))
    return total
