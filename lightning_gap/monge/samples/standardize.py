"""Coordinates in which a map is learned: standardized features, principal components."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gap.checks import check_integer
from lightning_gap.monge.ot.checks import check_samples

__all__ = ["AffineRepresentation", "moments", "principal_components"]

# Numbers that are in double precision at once.
_BLOCK = 2**22


class AffineRepresentation(nn.Module):
    r"""An affine change of coordinates and its inverse.

    .. math::
        z = V\,\frac{x - m}{s}, \qquad x = m + s \odot V^\top z

    with the mean :math:`m`, a scale :math:`s` per feature, and orthonormal principal components :math:`V` as rows.
    With fewer components than features, ``decode(encode(x))`` is the projection of ``x`` onto them. What it adds to
    scikit-learn's ``StandardScaler`` and ``PCA``: it is a module, differentiable, in the map's checkpoint, on its
    device and in its precision; and it is fitted in blocks, without a copy of the samples.

    Args:
        dim: Number :math:`d` of features.
        components: Number :math:`k \le d` of principal components; all features, without a rotation, where ``None``.

    Raises:
        TypeError: A number is no integer.
        ValueError: A number is out of range.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.0]) + 5
        >>> representation = AffineRepresentation.fit(x, standardize=True)
        >>> z = representation.encode(x)
        >>> [round(float(s), 3) for s in z.std(dim=0, correction=0)]
        [1.0, 1.0, 0.0]
        >>> torch.allclose(representation.decode(z), x, atol=1e-5)
        True
    """

    mean: Tensor
    scale: Tensor
    components: Tensor | None

    def __init__(self, dim: int, components: int | None = None) -> None:
        super().__init__()
        check_integer("dim", dim)
        if components is not None:
            check_integer("components", components)
            if components > dim:
                raise ValueError(f"components={components} is more than the {dim} features: use components <= {dim}")
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("components", None if components is None else torch.eye(components, dim))

    @classmethod
    def fit(
        cls, samples: Tensor, *, standardize: bool = False, components: int | None = None
    ) -> "AffineRepresentation":
        """Return the representation of some samples, the same for the same samples.

        Args:
            samples: ``(n, d)`` samples.
            standardize: Whether to divide each feature by its standard deviation; a constant feature keeps its scale.
            components: Number of principal components to keep, at most as many as directions in which the samples
                vary. Their signs are such that the largest entry is positive.

        Returns:
            A module on the device and in the precision of the samples.

        Raises:
            TypeError: ``samples`` is no floating-point tensor, or ``components`` no integer.
            ValueError: The samples are not finite, or have fewer directions than ``components``.
        """
        check_samples("samples", samples)
        with torch.device(samples.device):
            representation = cls(samples.shape[1], components).to(samples)
        with torch.no_grad():
            samples = samples.detach()
            mean, scale = moments(samples)
            scale = scale if standardize else torch.ones_like(mean)
            representation.mean.copy_(mean)
            representation.scale.copy_(scale)
            if representation.components is not None and components is not None:
                representation.components.copy_(principal_components(samples, mean, scale, components))
        return representation

    @property
    def hparams(self) -> dict[str, Any]:
        """Arguments that make a module of the same shapes, to load a ``state_dict`` into."""
        return {"dim": len(self.mean), "components": None if self.components is None else len(self.components)}

    @property
    def encoded_dim(self) -> int:
        """Dimension of the encoded samples."""
        return len(self.mean if self.components is None else self.components)

    def agrees_with(self, other: "AffineRepresentation | None") -> bool:
        """Return whether another representation encodes as this one does, but for rounding.

        Args:
            other: The other, on any device and in any precision; ``None`` for raw samples.
        """
        if other is None or other.hparams != self.hparams:
            return False
        theirs = other.state_dict()
        return all(
            torch.allclose(theirs[name].to(mine), mine, rtol=1e-4, atol=1e-6)
            for name, mine in self.state_dict().items()
        )

    def encode(self, x: Tensor) -> Tensor:
        """Return the coordinates ``(..., k)`` of samples ``(..., d)``, differentiably.

        Raises:
            ValueError: The last dimension is not :math:`d`.
        """
        mean, scale, components = self._matching(x, len(self.mean), "encode")
        z = (x.to(mean.dtype) - mean) / scale
        return z if components is None else z @ components.mT

    def decode(self, z: Tensor) -> Tensor:
        """Return the samples ``(..., d)`` that have the coordinates ``(..., k)``, differentiably.

        Raises:
            ValueError: The last dimension is not :math:`k`.
        """
        mean, scale, components = self._matching(z, self.encoded_dim, "decode")
        z = z.to(mean.dtype)
        return (z if components is None else z @ components) * scale + mean

    def forward(self, x: Tensor) -> Tensor:
        """Return :meth:`encode` of the samples."""
        return self.encode(x)

    def extra_repr(self) -> str:
        """Return the shapes, for ``print``."""
        return f"dim={len(self.mean)}, encoded_dim={self.encoded_dim}"

    def _matching(self, x: Tensor, dim: int, verb: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the buffers in the precision of the result: the higher one of samples and buffers."""
        if x.dim() == 0 or x.shape[-1] != dim:
            raise ValueError(f"samples to {verb} must have dimension {dim}, got shape {tuple(x.shape)}")
        dtype = torch.promote_types(x.dtype, self.mean.dtype)
        components = None if self.components is None else self.components.to(dtype)
        return self.mean.to(dtype), self.scale.to(dtype), components


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

    Above ``dense`` rows and features only the wanted singular vectors are found; ``block`` numbers are in double
    precision at once.
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
