"""What a figure of a map shows: the samples of each condition, in which space, and between which limits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_gap.checks import check_choice

__all__ = ["Array", "Panel", "Space", "array_of", "components", "limits_of", "panels_of", "space_of"]

Array = NDArray[np.float64]
Space = Literal["auto", "line", "plane", "sphere", "components"]

# The axes hold this part of each set; points beyond them are counted.
_SHOWN = 0.99
_IMAGES_SHOWN = 0.9


@dataclass(frozen=True)
class Panel:
    """One condition's samples."""

    source: Array
    mapped: Array
    target: Array
    name: str | None

    def through(self, axes_of: Callable[[Array], Array]) -> "Panel":
        """Return the samples in other coordinates."""
        return Panel(axes_of(self.source), axes_of(self.mapped), axes_of(self.target), self.name)

    def at_most(self, most: int) -> "Panel":
        """Return a fixed choice of the samples, in their order."""
        pairs, target = (
            np.sort(np.random.default_rng(0).permutation(len(x))[:most]) for x in (self.source, self.target)
        )
        return Panel(self.source[pairs], self.mapped[pairs], self.target[target], self.name)

    @property
    def sets(self) -> tuple[Array, Array, Array]:
        """Source, images and target."""
        return self.source, self.mapped, self.target


def array_of(name: str, samples: ArrayLike | Tensor, dims: tuple[int, ...]) -> Array:
    """Return samples as an array of so many dimensions, or raise ``ValueError``."""
    array = np.asarray(
        samples.detach().cpu().double().numpy() if isinstance(samples, Tensor) else samples, dtype=np.float64
    )
    if array.ndim not in dims or array.size == 0:
        kinds = "(n, d)" if dims == (2,) else "(n, d), or (K, n, d) for conditions"
        raise ValueError(f"{name} must have shape {kinds} and not be empty, got {array.shape}")
    return array


def _sets(name: str, samples: Any) -> tuple[list[Array], bool]:
    """Return the samples of each condition, and whether there are conditions."""
    if isinstance(samples, list | tuple) and samples and all(np.ndim(one) == 2 for one in samples):
        return [array_of(f"{name}[{k}]", one, (2,)) for k, one in enumerate(samples)], True
    array = array_of(name, samples, (2, 3))
    return ([array], False) if array.ndim == 2 else (list(array), True)


def panels_of(source: Any, mapped: Any, target: Any, conditions: Sequence[str] | None) -> list[Panel]:
    """Return a panel for each condition, once the samples have been checked."""
    (x, several), (y, y_several), (z, z_several) = (
        _sets(name, samples) for name, samples in (("source", source), ("mapped", mapped), ("target", target))
    )
    if not len(x) == len(y) == len(z) or not several == y_several == z_several:
        raise ValueError(f"source, mapped and target have {len(x)}, {len(y)} and {len(z)} conditions: they must agree")
    if conditions is not None and (not several or len(conditions) != len(x)):
        raise ValueError(f"conditions has {len(conditions)} names for {len(x) if several else 'no'} conditions")
    names = conditions or [f"condition {k}" for k in range(len(x))]
    panels = []
    for k, (first, image, second) in enumerate(zip(x, y, z, strict=True)):
        where = f"[{k}]" if several else ""
        if image.shape != first.shape:
            raise ValueError(f"mapped{where} has shape {image.shape} but source {first.shape}: they are paired by row")
        if not first.shape[1] == second.shape[1] == x[0].shape[1]:
            raise ValueError(f"target{where} has {second.shape[1]} features, but source{where} {first.shape[1]}")
        for name, samples in (("source", first), ("target", second)):
            if not np.isfinite(samples).all():
                raise ValueError(f"{name}{where} holds NaN or infinity: remove these samples")
        image = np.where(np.isfinite(image).all(1, keepdims=True), image, np.nan)
        panels.append(Panel(first, image, second, str(names[k]) if several else None))
    return panels


def space_of(space: str, panels: Sequence[Panel]) -> str:
    """Return the space to draw in, or raise ``ValueError`` where the samples do not suit it."""
    check_choice("space", space, get_args(Space))
    dim = panels[0].source.shape[1]
    on_sphere = dim == 3 and all(
        bool(np.all(np.abs(np.linalg.norm(x[np.isfinite(x).all(1)], axis=1) - 1) < 1e-3))
        for p in panels
        for x in p.sets
    )
    if space == "auto":
        return "line" if dim == 1 else "plane" if dim == 2 else "sphere" if on_sphere else "components"
    suits = {"line": dim == 1, "plane": dim == 2, "sphere": on_sphere, "components": dim >= 2}
    if not suits[space]:
        needs = {"line": "1 feature", "plane": "2 features", "sphere": "unit vectors of 3", "components": "2 or more"}
        raise ValueError(f"space={space!r} needs {needs[space]}, got {dim} features: use space='auto'")
    return space


def components(samples: Array, of_target: bool) -> tuple[Callable[[Array], Array], list[str]]:
    """Return a function to the first two principal components, and the names of the axes."""
    mean = samples.mean(0)
    _, s, rows = np.linalg.svd(samples - mean, full_matrices=len(samples) < 2)
    rows = rows[:2]
    # A sign that does not depend on the linear algebra library.
    rows = rows * np.sign(rows[np.arange(2), np.abs(rows).argmax(1)] + 0.0)[:, None]
    total = float((s**2).sum())
    shares = [float(s[k] ** 2) / total if total > 0 and k < len(s) else 0.0 for k in range(2)]
    of = "target" if of_target else "basis"
    names = [f"component {k + 1} of the {of} ({100 * share:.3g} % of its variance)" for k, share in enumerate(shares)]
    return (lambda x: (x - mean) @ rows.T), names


def limits_of(panels: Sequence[Panel], *, equal: bool) -> Array:
    """Return ``(2, d)`` lower and upper limits that a few points far away do not move."""
    given = np.concatenate([x for p in panels for x in (p.source, p.target)])
    images = np.concatenate([p.mapped for p in panels])
    images = images[np.isfinite(images).all(1)]
    low, high = np.quantile(given, [(1 - _SHOWN) / 2, (1 + _SHOWN) / 2], axis=0)
    if len(images):
        ends = np.quantile(images, [(1 - _IMAGES_SHOWN) / 2, (1 + _IMAGES_SHOWN) / 2], axis=0)
        low, high = np.minimum(low, ends[0]), np.maximum(high, ends[1])
    span = high - low
    flat = span <= 1e-9 * np.maximum(1.0, np.abs(high))
    span = np.where(flat, span.max() if not flat.all() else 1.0, span)
    middle = (low + high) / 2
    if equal and span.max() < 8 * span.min():
        span = np.full_like(span, span.max())
    return np.stack([middle - 0.55 * span, middle + 0.55 * span])
