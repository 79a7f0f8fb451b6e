"""Against the map and part of the way along it: raw samples encoded, moved and decoded."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_gap.checks import check_integer, check_number
from lightning_gap.monge.border import (
    by_batches,
    conditions_for,
    decoded,
    device_of,
    encoded,
    evaluating,
    read_samples,
)
from lightning_gap.monge.maps.brenier import BrenierMap
from lightning_gap.monge.maps.displacement import displaced
from lightning_gap.monge.maps.inversion import Preimages, affine_guess, preimages
from lightning_gap.monge.maps.sphere import SphereMap
from lightning_gap.monge.ot.costs import Geodesic

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["interpolate", "inverse", "is_on_sphere", "is_one", "times_of"]

_DISTANCES = 2**24


def is_on_sphere(model: "MongeMap") -> bool:
    """Return whether a map's samples and images are points of the unit sphere."""
    return isinstance(model.map, SphereMap) or isinstance(model.cost, Geodesic)


def times_of(name: str, t: Any, least: float, greatest: float) -> list[float]:
    """Return one time, or several, as numbers within bounds, or refuse them by the name of their argument."""
    several = t.flatten().tolist() if hasattr(t, "flatten") else list(t) if isinstance(t, Sequence) else [t]
    if not several:
        raise ValueError(f"{name} is empty: give a time, or several")
    times = [check_number(name, time) for time in several]
    outside = [time for time in times if not least <= time <= greatest]
    if outside:
        raise ValueError(
            f"{name} must be from {least:g} to {greatest:g}, got {outside[0]:g}: nothing is known before and after"
        )
    return times


def is_one(t: Any) -> bool:
    """Return whether a time is a single number."""
    return not isinstance(t, Sequence) and getattr(t, "ndim", 0) == 0


def interpolate(
    model: "MongeMap", x: Any, t: Any, condition: Any, *, batch_size: int, layer: str | None, obsm: str | None
) -> Tensor:
    """Return raw points on the way from samples to images: see :meth:`MongeMap.interpolate`."""
    times = times_of("t", t, 0, 1)
    function = partial(_on_the_way, times=times)
    with torch.no_grad():
        points = by_batches(model, x, condition, function, batch_size=batch_size, layer=layer, obsm=obsm)
    return points[0] if is_one(t) else points


def _on_the_way(model: "MongeMap", x: Tensor, condition: Tensor | None, *, times: Sequence[float]) -> Tensor:
    z = encoded(model, x)
    images, on_sphere = model(z, condition), is_on_sphere(model)
    return torch.stack([decoded(model, displaced(z, images, t, on_sphere=on_sphere)) for t in times])


def inverse(
    model: "MongeMap",
    y: Any,
    condition: Any,
    *,
    t: float = 1.0,
    near: Any = None,
    tolerance: float = 1e-5,
    max_iterations: int = 100,
    layer: str | None = None,
    obsm: str | None = None,
    argument: str = "y",
) -> Tensor:
    """Return raw points which are raw samples at time ``t``: see :meth:`MongeMap.inverse`."""
    y = read_samples(model, argument, y, layer, obsm)
    check_number("tolerance", tolerance, above=0)
    check_integer("max_iterations", max_iterations)
    each, device = conditions_for(model, condition, len(y)), device_of(model)
    each = None if each is None else each.to(device)
    some = None if near is None else read_samples(model, "near", near, layer, obsm)
    on_sphere = is_on_sphere(model)

    def moved(z: Tensor, conditions: Tensor | None) -> Tensor:
        images = model(z, conditions)
        return images if t == 1 else displaced(z, images, t, on_sphere=on_sphere)

    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        samples = encoded(model, y.to(device))
        if on_sphere:
            Geodesic().check_domain(argument, samples)
        _check_dim(model, argument, samples)
        if some is not None and len(some):
            starts = [_nearest(moved, encoded(model, some.to(device)), samples, each)]
        else:
            starts = [samples, *(torch.lerp(samples, start, t) for start in _guesses(model, samples))]
        found = preimages(
            lambda z, rows: moved(z, None if each is None else each[rows]),
            samples,
            starts,
            tolerance=tolerance,
            max_iterations=max_iterations,
            on_sphere=on_sphere,
        )
        if message := _what_is_wrong(found, argument):
            rank_zero_warn(message)
        return decoded(model, found.points).to(y.device)


def _check_dim(model: "MongeMap", argument: str, samples: Tensor) -> None:
    dim = getattr(model.map, "dim", None)
    if isinstance(dim, int) and samples.shape[1] != dim:
        raise ValueError(f"{argument} has dimension {samples.shape[1]}, but the map was made with dim={dim}")


def _guesses(model: "MongeMap", y: Tensor) -> Iterator[Tensor]:
    """Yield what a map itself knows of its inverse."""
    net = model.map
    if isinstance(net, BrenierMap):
        yield net.inverse(y)
    elif net is not None and (guess := affine_guess(net, y)) is not None:
        yield guess


def _nearest(
    moved: Callable[[Tensor, Tensor | None], Tensor], points: Tensor, y: Tensor, each: Tensor | None
) -> Tensor:
    """Return of each sample the point whose image is nearest, under the sample's condition."""
    if each is None:
        return points[_nearest_rows(moved(points, None), y)]
    conditions, which = each.unique(dim=0, return_inverse=True)
    start = torch.empty_like(y)
    for k, condition in enumerate(conditions):
        here = which == k
        images = moved(points, condition.expand(len(points), *condition.shape))
        start[here] = points[_nearest_rows(images, y[here])]
    return start


def _nearest_rows(images: Tensor, y: Tensor) -> Tensor:
    parts = [torch.cdist(part, images).argmin(1) for part in y.split(max(1, _DISTANCES // len(images)))]
    return torch.cat(parts)


def _what_is_wrong(found: Preimages, argument: str) -> str | None:
    """Say where no preimage was found, or where there may be several."""
    failed, n = (~found.converged).nonzero().flatten(), len(found.points)
    signs = found.orientations[found.converged]
    folded = min(int((signs < 0).sum()), int((signs > 0).sum()))
    remedy = (
        "Give near=, samples of the source, to start from those; a larger gap_weight, or BrenierMap, makes maps that "
        "do not fold"
    )
    if len(failed):
        share = (found.residuals / found.sizes)[failed]
        first = ", ".join(str(int(row)) for row in failed[:3]) + (", ..." if len(failed) > 3 else "")
        return (
            f"inverse: {len(failed)} of {n} samples of {argument} (rows {first}) are the image of no point found. The "
            f"nearest images miss them by {float(share.median()):.2g} of their size in the median, and by "
            f"{float(share.max()):.2g} at most (a distance of {float(found.residuals[failed].max()):.3g} in the map's "
            f"coordinates). {'The map folds' if folded else 'The map does not reach them, or has no inverse there'}: "
            f"compare transport() of these points with the samples before you use them. {remedy if folded else ''}"
        ).rstrip()
    if folded:
        return (
            f"inverse: the map folds, with {folded} of {n} points on the other side than the rest: samples have "
            f"several preimages, and got one of them. {remedy}"
        )
    return None
