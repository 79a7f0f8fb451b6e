"""Affine terms of maps: one, or one for each label."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gap.monge.maps.starts import StartPair
from lightning_gap.monge.ot.gaussian import gaussian_map

__all__ = ["AffineTerm", "affine_of_labels", "affinely", "for_each_label"]

# Matrix and offset of a map ``A x + b``; A is ``None`` for a translation.
AffineTerm = tuple[Tensor | None, Tensor]


def affine_of_labels(start: str, parts: Sequence[StartPair], count: int, pooled: AffineTerm) -> list[AffineTerm]:
    r"""Return the affine term of each label; the pooled one where a label has no samples.

    The map between the Gaussians of a label of few samples, :math:`n_k` on the smaller side, is drawn towards that of
    the samples of all labels, each about its own mean: by the share :math:`d / (d + n_k)` of its matrix, while means
    are known well and stay its own.
    """
    terms = [pooled] * count
    centred = [
        [_moments_free(x, w) for x, w in ((p.source, p.source_weights), (p.target, p.target_weights))] for p in parts
    ]
    within: Tensor | None = None
    if start == "gaussian" and parts:
        sides = (torch.cat([sides[i][0] for sides in centred]) for i in range(2))
        within = gaussian_map(*sides, shrinkage="auto")[0]
    for part, ((_, m_source), (_, m_target)) in zip(parts, centred, strict=True):
        assert part.condition is not None
        if within is None:
            terms[int(part.condition)] = None, m_target - m_source
            continue
        weights = part.source_weights, part.target_weights
        A = gaussian_map(part.source, part.target, weights=weights, shrinkage="auto")[0]
        few, dim = min(len(part.source), len(part.target)), len(A)
        A = A + dim / (dim + few) * (within - A) if len(parts) > 1 else A
        terms[int(part.condition)] = A, m_target - A @ m_source
    return terms


def _moments_free(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return samples about their mean, and the mean."""
    x = x.double()
    mean = x.mean(0) if weights is None else weights.double() @ x / weights.double().sum()
    return x - mean, mean


def affinely(x: Tensor, matrix: Tensor | None, offset: Tensor, label: Tensor | None) -> Tensor:
    """Return ``matrix @ x + offset``, with those of each sample's label where there are some; no matrix is none."""
    with torch.autocast(x.device.type, enabled=False):
        points = x.to(offset.dtype)
        if label is None:
            return (points.new_zeros(()) + offset if matrix is None else F.linear(points, matrix, offset)).to(x.dtype)
        if matrix is None:
            return offset[label].to(x.dtype)
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            products = (matrix[label] @ points[..., None])[..., 0]
            return (products + offset[label]).to(x.dtype)
        # Label by label, so that no sample has a matrix of its own in memory.
        rows, labels = points.reshape(-1, points.shape[-1]), label.reshape(-1)
        images = rows.clone()
        for k in labels.unique().tolist():
            here = (labels == k).nonzero().flatten()
            images = images.index_copy(0, here, F.linear(rows[here], matrix[k], offset[k]))
        return images.view(x.shape).to(x.dtype)


def for_each_label(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Give each label the affine term of a state in which all have the same, as of an older version."""
    for name in ("matrix", "offset"):
        held, own = state.get(prefix + name), getattr(module, name, None)
        if isinstance(held, Tensor) and isinstance(own, Tensor) and held.dim() == own.dim() - 1:
            state[prefix + name] = held.expand(own.shape[0], *held.shape).clone()
