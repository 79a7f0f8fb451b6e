"""Means, deviations and principal components of samples, block by block in double precision."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["moments", "principal_components"]

# Numbers that are in double precision at once.
_BLOCK = 2**22


def moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations of the features, 1 for a constant one, in double precision."""
    n = len(samples)
    mean = torch.stack([block.sum(dim=0) for block in _blocks(samples)]).sum(dim=0) / n
    square = torch.stack([(block - mean).square().sum(dim=0) for block in _blocks(samples)]).sum(dim=0)
    deviation = (square / n).sqrt()
    # What is left of a constant feature is the rounding of its mean.
    constant = deviation <= mean.abs() * n**0.5 * torch.finfo(torch.float64).eps
    return mean, torch.where(constant, 1.0, deviation)


def _blocks(
    samples: Tensor, mean: Tensor | float = 0.0, scale: Tensor | float = 1.0, block: int = _BLOCK
) -> Iterator[Tensor]:
    """Yield the samples in double precision, which keeps digits where a mean is large against the spread."""
    for part in samples.split(max(1, block // samples.shape[1])):
        yield (part.double() - mean) / scale


def principal_components(
    samples: Tensor, mean: Tensor, scale: Tensor, components: int, *, dense: int = 2048, block: int = _BLOCK
) -> Tensor:
    """Return the leading principal components as rows, the largest entry of each positive.

    Args:
        samples: ``(n, d)`` samples.
        mean: Their mean.
        scale: What each feature is divided by.
        components: How many.
        dense: All singular vectors are found at once where the smaller side is not above this; only the wanted ones,
            otherwise.
        block: Numbers that are in double precision at once.

    Raises:
        ValueError: The samples vary in fewer directions.
    """
    n, d = samples.shape
    at_once = min(n, d) <= dense or 4 * components >= min(n, d)
    if at_once and d <= n:
        # The d x d second moments are far smaller than the samples where these are many.
        second = torch.zeros(d, d, dtype=torch.float64, device=samples.device)
        for part in _blocks(samples, mean, scale, block):
            second += part.mT @ part
        squares, vectors = torch.linalg.eigh(second)
        squares, v = squares.flip(0), vectors.flip(1).mT
    elif at_once:
        _, values, v = torch.linalg.svd(torch.cat(list(_blocks(samples, mean, scale, block))), full_matrices=False)
        squares = values.square()
    else:
        squares, v = _leading_singular_vectors(samples, mean, scale, components, block)
    directions = int((squares > squares[0] * max(n, d) * torch.finfo(torch.float64).eps).sum())
    if components > directions:
        raise ValueError(
            f"components={components}, but the {n} training samples vary in {directions} directions only: "
            f"use components <= {directions}, or more samples"
        )
    v = v[:components]
    signs = v.gather(1, v.abs().argmax(dim=1, keepdim=True)).sign()
    result: Tensor = v * signs
    return result


def _leading_singular_vectors(
    samples: Tensor, mean: Tensor, scale: Tensor, components: int, block: int
) -> tuple[Tensor, Tensor]:
    """Return squares of singular values and the right vectors, by Lanczos, which multiplies blocks of samples."""
    # Imported here: it takes a while, which only many features should pay.
    from scipy.sparse.linalg import LinearOperator, svds

    def times(vector: Any) -> Any:
        x = torch.as_tensor(vector).to(mean)
        return torch.cat([part @ x for part in _blocks(samples, mean, scale, block)]).cpu().numpy()

    def transposed_times(vector: Any) -> Any:
        parts = torch.as_tensor(vector).to(mean).split(max(1, block // samples.shape[1]))
        pairs = zip(_blocks(samples, mean, scale, block), parts, strict=True)
        return torch.stack([part.mT @ x for part, x in pairs]).sum(dim=0).cpu().numpy()

    shape = tuple(samples.shape)
    operator = LinearOperator(shape, matvec=times, rmatvec=transposed_times, dtype=np.float64)
    _, values, rows = svds(operator, k=components, v0=np.ones(min(shape)), solver="arpack")
    order = values.argsort()[::-1].copy()
    return torch.from_numpy(values[order]).square().to(mean), torch.from_numpy(rows[order]).to(mean)
