"""Networks that map samples to samples."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gap.monge.maps.networks import (
    Activation,
    activation_factory,
    check_condition,
    check_widths,
    network,
    perceptron,
)
from lightning_gap.monge.ot.checks import check_pair
from lightning_gap.monge.ot.costs import Cost
from lightning_gap.monge.ot.gaussian import gaussian_map

__all__ = ["MLP", "ResidualMLP", "Start", "StartedMap", "TransportMap"]

Start = Literal["identity", "mean", "gaussian"]


class TransportMap(nn.Module):
    """What the maps of this package have in common: their dimension, their arguments, and checks of their inputs.

    Args:
        dim: Dimension :math:`d` of the samples.
        hidden: Widths of the hidden layers.
        activation: Name of the activation between layers, a class of ``torch.nn``, or a function that makes a module.
        conditions: Number of categories of the condition, or ``None``.
        condition_dim: Dimension of the condition's vectors, or ``None``.
        embedding_dim: Width of the condition's embedding, for a map that may be conditional.
        others: Further arguments that make the map again.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int],
        activation: Activation,
        *,
        conditions: int | None = None,
        condition_dim: int | None = None,
        embedding_dim: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.conditions, self.condition_dim = conditions, condition_dim
        self.conditional = conditions is not None or condition_dim is not None
        name = activation_factory(activation)[1]
        arguments = {"dim": dim, "hidden": list(check_widths(dim, hidden)), "activation": name, **others}
        if embedding_dim is not None:
            arguments |= {"conditions": conditions, "condition_dim": condition_dim, "embedding_dim": embedding_dim}
        self._hparams = None if name is None or others.get("cost", "") is None else arguments

    @property
    def hparams(self) -> dict[str, Any] | None:
        """Plain arguments that make the map again; ``None`` where the activation or the cost is one of your own."""
        return None if self._hparams is None else dict(self._hparams)

    @property
    def made_for(self) -> Cost | None:
        """The cost whose optimal maps have the structure of this map; ``None`` where it suits any."""
        return None

    def inputs(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, ...]:
        """Return the arguments of the network, or raise ``ValueError`` where they do not fit the map.

        Args:
            x: ``(..., d)`` samples.
            condition: ``(...)`` labels or ``(..., p)`` vectors, for a conditional map.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"the samples have dimension {x.shape[-1]}, but the map was made with dim={self.dim}")
        if not self.conditional:
            if condition is not None:
                raise ValueError("this map takes no condition: use a conditional one, as ConditionalMap")
            return (x,)
        if condition is None:
            raise ValueError("this map is conditional: give the samples' conditions, as in map(x, condition)")
        check_condition(x, condition, self.conditions, self.condition_dim)
        return x, condition


class MLP(TransportMap):
    r"""A plain multi-layer perceptron, :math:`T(x) = \mathrm{net}(x)`.

    It starts far from the identity: prefer :class:`ResidualMLP` unless source and target have nothing in common.

    Args:
        dim: Dimension :math:`d` of the samples.
        hidden: Widths of the hidden layers.
        activation: Name of the activation between layers (``"gelu"``, ``"silu"``, ``"relu"``, ...), a class of
            ``torch.nn``, or a function that makes a module.

    Raises:
        TypeError: ``hidden`` is no sequence, or ``activation`` makes nothing.
        ValueError: A width is not a positive integer, or the activation's name is not known.

    Example:
        >>> import torch
        >>> MLP(2, (16,))(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, dim: int, hidden: Sequence[int] = (128, 128, 128), activation: Activation = "gelu") -> None:
        super().__init__(dim, hidden, activation)
        self.network = perceptron(dim, hidden, dim, activation_factory(activation)[0], zero=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, d)`` samples to ``(n, d)`` samples."""
        image: Tensor = self.network(*self.inputs(x, None))
        return image.to(x.dtype)


class StartedMap(TransportMap):
    r"""A map whose network learns what an affine term, found from data before the first update, leaves to learn.

    Args:
        dim: Dimension :math:`d` of the samples.
        hidden: Widths of the hidden layers.
        activation: Makes the activation between layers.
        start: ``"identity"``, ``"mean"`` or ``"gaussian"``.
        others: Arguments of :class:`TransportMap`.
    """

    offset: Tensor
    matrix: Tensor
    started: Tensor

    def __init__(self, dim: int, hidden: Sequence[int], activation: Activation, start: Start, **others: Any) -> None:
        if start not in get_args(Start):
            raise ValueError(f"start must be one of {', '.join(get_args(Start))}, got {start!r}")
        super().__init__(dim, hidden, activation, start=start, **others)
        self.starts_at = start
        if start != "identity":
            # A number: callbacks that average weights average buffers too, and truth values have no average.
            self.register_buffer("started", torch.zeros(()))
            self.register_buffer("offset", torch.zeros(dim))
        if start == "gaussian":
            self.register_buffer("matrix", self.matrix_at_identity())

    def matrix_at_identity(self) -> Tensor:
        """Return the matrix with which the map is the identity."""
        return torch.eye(self.dim)

    @torch.no_grad()
    def start(self, source: Tensor, target: Tensor) -> None:
        """Set the affine term from training samples.

        Once: a map that has started keeps its start, in a second fit and from a checkpoint as well.

        Args:
            source: ``(n, d)`` samples.
            target: ``(m, d)`` samples.

        Raises:
            TypeError: An argument is no floating-point tensor.
            ValueError: Shapes do not fit, or values are not finite.
        """
        if self.starts_at == "identity" or bool(self.started):
            return
        check_pair("source", source, "target", target)
        if source.shape[1] != self.dim:
            raise ValueError(f"source has dimension {source.shape[1]}, but the map was made with dim={self.dim}")
        if self.starts_at == "mean":
            A, b = None, target.double().mean(0) - source.double().mean(0)
        else:
            A, b = gaussian_map(source, target, shrinkage="auto")
        matrix, offset = self.affine_term(A, b)
        self.offset.copy_(offset)
        if matrix is not None:
            self.matrix.copy_(matrix)
        self.started.fill_(1)

    def affine_term(self, A: Tensor | None, b: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return matrix and offset with which the map starts at ``A x + b``, or at ``x + b`` where A is ``None``.

        Args:
            A: ``(d, d)`` symmetric matrix.
            b: ``(d,)`` vector.
        """
        return A, b

    def affine(self, x: Tensor) -> Tensor:
        """Return the matrix times ``x`` plus the offset, in full precision under autocast.

        Args:
            x: ``(..., d)`` samples.
        """
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.matrix.dtype), self.matrix, self.offset).to(x.dtype)


class ResidualMLP(StartedMap):
    r"""A multi-layer perceptron that learns the displacement, :math:`T(x) = x + \mathrm{net}(x)`.

    The last layer starts at zero, so that the map starts at the identity, whose Monge gap is minimal; or at another
    optimal map, :math:`T(x) = A x + b + \mathrm{net}(x)`, with A and b fixed before the first update.

    Args:
        dim: Dimension :math:`d` of the samples.
        hidden: Widths of the hidden layers.
        activation: Name of the activation between layers (``"gelu"``, ``"silu"``, ``"relu"``, ...), a class of
            ``torch.nn``, or a function that makes a module.
        start: ``"identity"``; ``"mean"``, the translation between the means, optimal for every cost
            :math:`h(x - y)`; or ``"gaussian"``, :func:`gaussian_map`, optimal for the squared Euclidean cost only.

    Raises:
        TypeError: ``hidden`` is no sequence, or ``activation`` makes nothing.
        ValueError: A width is not a positive integer, or a name is not known.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 2)
        >>> torch.equal(ResidualMLP(2)(x), x)
        True
        >>> net = ResidualMLP(2, start="mean")
        >>> net.start(x, x + 3)
        >>> torch.allclose(net(x), x + 3)
        True
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (128, 128, 128),
        activation: Activation = "gelu",
        *,
        start: Start = "identity",
    ) -> None:
        super().__init__(dim, hidden, activation, start)
        self.displacement = network(dim, hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, d)`` samples to ``(n, d)`` samples."""
        return self.moved(x, None)

    def moved(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Return the affine term plus the network's displacement.

        Args:
            x: ``(..., d)`` samples.
            condition: Their conditions, for a conditional map.
        """
        displacement: Tensor = self.displacement(*self.inputs(x, condition))
        if self.starts_at == "identity":
            return x + displacement
        return (x + self.offset if self.starts_at == "mean" else self.affine(x)) + displacement
