"""Coordinates in which a map is learned: standardized features, principal components."""

import math
from typing import Any

import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

from lightning_gap.monge.samples import check_samples

__all__ = ["AffineRepresentation"]

# Below this size of the smaller side, all singular vectors are found at once; above it, only the wanted ones.
_DENSE = 2048


class AffineRepresentation(nn.Module):
    r"""An affine change of coordinates and its inverse.

    .. math::
        z = V\,\frac{x - m}{s}, \qquad x = m + s \odot V^\top z

    with the mean :math:`m`, a scale :math:`s` per feature, and orthonormal principal components :math:`V` as rows.
    With fewer components than features, ``decode(encode(x))`` is the projection of ``x`` onto them.

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
        _check_count("dim", dim)
        if components is not None:
            _check_count("components", components)
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
        dim = samples.shape[1]
        representation = cls(dim, components).to(samples)
        with torch.no_grad():
            # In double: a mean that is large against the spread would take the digits away.
            centred = samples.detach().double()
            mean = centred.mean(dim=0)
            centred = centred - mean
            scale = torch.ones_like(mean)
            if standardize:
                deviation = centred.square().mean(dim=0).sqrt()
                # What is left of a constant feature is rounding, of its mean.
                constant = deviation <= mean.abs() * len(samples) ** 0.5 * torch.finfo(torch.float64).eps
                scale = torch.where(constant, scale, deviation)
                centred = centred / scale
            representation.mean.copy_(mean)
            representation.scale.copy_(scale)
            if representation.components is not None and components is not None:
                representation.components.copy_(_principal_components(centred, components))
        return representation

    @property
    def hparams(self) -> dict[str, Any]:
        """Arguments that make a module of the same shapes, to load a ``state_dict`` into."""
        return {"dim": len(self.mean), "components": None if self.components is None else len(self.components)}

    @property
    def encoded_dim(self) -> int:
        """Dimension of the encoded samples."""
        return len(self.mean if self.components is None else self.components)

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


def _principal_components(centred: Tensor, components: int) -> Tensor:
    n, d = centred.shape
    if min(n, d) <= _DENSE or 4 * components >= min(n, d):
        if d <= n:
            # The d x d second moments: far smaller than the samples where these are many.
            eigenvalues, vectors = torch.linalg.eigh(centred.mT @ centred)
            squares, v = eigenvalues.flip(0).clamp(min=0), vectors.flip(1).mT
        else:
            _, values, v = torch.linalg.svd(centred, full_matrices=False)
            squares = values.square()
    else:
        start = torch.ones(min(n, d), dtype=torch.float64).numpy()
        _, found, rows = svds(centred.cpu().numpy(), k=components, v0=start, solver="arpack")
        order = found.argsort()[::-1]
        squares = torch.from_numpy(found[order].copy()).square()
        v = torch.from_numpy(rows[order].copy())
    directions = int((squares > squares.max() * max(n, d) * torch.finfo(torch.float64).eps).sum())
    if not math.isfinite(float(squares.sum())) or components > directions:
        raise ValueError(
            f"components={components}, but the {n} training samples vary in {directions} directions only: "
            f"use components <= {directions}, or more samples"
        )
    v = v[:components]
    largest = v.gather(1, v.abs().argmax(dim=1, keepdim=True))
    return v * largest.sign()


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
