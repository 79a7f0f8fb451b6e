"""Coordinates in which a map is learned: standardized features, principal components."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_gap.checks import check_count
from lightning_gap.monge.ot.checks import check_samples
from lightning_gap.monge.samples.components import moments, principal_components

__all__ = ["AffineRepresentation"]


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
        check_count("dim", dim)
        if components is not None:
            check_count("components", components)
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
