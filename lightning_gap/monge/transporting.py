"""What a trained map does with raw samples: forwards, backwards, and part of the way."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from lightning_gap.monge.border import transport
from lightning_gap.monge.cells.images import pull, push
from lightning_gap.monge.dynamics import interpolate, inverse
from lightning_gap.monge.pretrained import Pretrained

if TYPE_CHECKING:
    from lightning_gap.monge.module import MongeMap

__all__ = ["Transporting"]


class Transporting(Pretrained):
    """A module with a map between encoded samples, and what may be asked of it in raw ones."""

    def transport(
        self,
        x: Any,
        condition: Any = None,
        *,
        batch_size: int = 65_536,
        layer: str | None = None,
        obsm: str | None = None,
    ) -> Tensor:
        """Return the images of raw samples, in evaluation mode and without gradients.

        Columns of a data frame and genes of ``AnnData`` are matched to ``feature_names`` by name, in any order; further
        ones are ignored with a warning. Tensors and arrays go by place.

        Args:
            x: ``(n, d)`` samples: a tensor on any device, an array, a sparse matrix, a data frame or ``AnnData``.
            condition: For a conditional map, one condition for all samples or one for each: names, labels, or vectors.
                Where they are of named columns: ``"A, 10"``, ``("A", 10)``, ``{"drug": "A", "dose": 10}``, or a table
                with these columns; a tensor holds encoded vectors. What was not trained on is warned of.
            batch_size: Rows that go through the network at once.
            layer: Layer of ``AnnData``; ``X`` by default where there is no layer, ``"X"`` where there are some.
            obsm: Embedding of ``AnnData`` in place of a layer.

        Returns:
            ``(n, d)`` tensor on the device of ``x``, in the network's precision and the map's order of features.

        Raises:
            TypeError: ``x`` is a path, or holds no real numbers.
            ValueError: The shape is not ``(n, d)``, a feature is missing, a sample is not finite (the rows are named),
                or another argument is out of range.
        """
        return transport(cast("MongeMap", self), x, condition, batch_size=batch_size, layer=layer, obsm=obsm)

    def inverse(
        self,
        y: Any,
        condition: Any = None,
        *,
        near: Any = None,
        tolerance: float = 1e-5,
        max_iterations: int = 100,
        layer: str | None = None,
        obsm: str | None = None,
    ) -> Tensor:
        r"""Return the raw points whose images are given raw samples, :math:`T(x) = y`, solved for each sample.

        By damped Gauss-Newton steps on :math:`|T(x) - y|^2` in the map's coordinates (on the sphere along it), from the
        better one of the sample itself and the inverse of the affine map that the network started at, or from ``near``;
        :class:`BrenierMap` by its convex conjugate. Where no preimage is found there is one warning, with how many
        samples and how far; they get the point whose image is nearest, never NaN. Where the map is seen to fold, so
        that samples have several preimages, there is one as well.

        Principal components lose what they do not span: the preimage lies in their span, and it is the projection of
        ``y`` that it is the preimage of.

        Args:
            y: ``(n, d)`` samples, as ``x`` of :meth:`transport`.
            condition: Conditions under which they are images, as in :meth:`transport`.
            near: ``(m, d)`` samples of the source: the search starts from the one whose image is nearest, and so finds,
                of several preimages, one where the source is.
            tolerance: Distance from image to sample that counts as none, as a share of the size of sample and
                displacement. One more step is taken within it.
            max_iterations: Most steps of a search; those that fail are repeated from solved neighbours.
            layer: Layer of ``AnnData``, as in :meth:`transport`.
            obsm: Embedding of ``AnnData`` in place of a layer.

        Returns:
            ``(n, d)`` tensor on the device of ``y``, in the network's precision and the map's order of features.

        Raises:
            TypeError: ``y`` is a path, or holds no real numbers; or a count is no integer.
            ValueError: As in :meth:`transport`; or the network has no gradient in its samples.

        Example:
            >>> import torch
            >>> from lightning_gap import MongeMap
            >>> from lightning_gap.monge import ResidualMLP
            >>> net, x = ResidualMLP(2, start="gaussian"), torch.randn(500, 2)
            >>> net.start(x, 2 * x + 1)
            >>> torch.allclose(MongeMap(map=net).inverse(2 * x + 1), x, atol=1e-4)
            True
        """
        return inverse(
            cast("MongeMap", self), y, condition, near=near, tolerance=tolerance, max_iterations=max_iterations,
            layer=layer, obsm=obsm,
        )  # fmt: skip

    def push(
        self,
        cells: Any,
        condition: Any = None,
        *,
        condition_key: str | Sequence[str] | None = None,
        layer: str | None = None,
        obsm: str | None = None,
        batch_size: int = 65_536,
    ) -> Any:
        """Return the images of cells as ``AnnData``: see :func:`lightning_gap.monge.cells.push`.

        Args:
            cells: ``AnnData``, in memory or backed, or the path to an ``.h5ad`` file. Genes go by name.
            condition: As in :meth:`transport`.
            condition_key: Column or columns of ``obs`` with each cell's condition; with ``condition``, those that get
                it.
            layer: Layer of the cells, as in :meth:`transport`.
            obsm: Embedding in place of a layer.
            batch_size: Rows that go through the network at once.

        Returns:
            ``AnnData`` with the ``obs`` of the cells, and the images where the samples were: their genes in the order
            of the cells'.
        """
        return push(
            self, cells, condition, condition_key=condition_key, layer=layer, obsm=obsm, batch_size=batch_size
        )  # fmt: skip

    def pull(
        self,
        cells: Any,
        condition: Any = None,
        *,
        condition_key: str | Sequence[str] | None = None,
        layer: str | None = None,
        obsm: str | None = None,
        **options: Any,
    ) -> Any:
        """Return the cells whose images are given, as ``AnnData``: see :func:`lightning_gap.monge.cells.pull`.

        Args:
            cells: The images, as ``cells`` of :meth:`push`.
            condition: As in :meth:`push`.
            condition_key: As in :meth:`push`.
            layer: As in :meth:`push`.
            obsm: As in :meth:`push`.
            **options: ``near``, ``tolerance`` and ``max_iterations`` of :meth:`inverse`.

        Returns:
            ``AnnData``, as of :meth:`push`.
        """
        return pull(self, cells, condition, condition_key=condition_key, layer=layer, obsm=obsm, **options)

    def interpolate(
        self,
        x: Any,
        t: Any,
        condition: Any = None,
        *,
        batch_size: int = 65_536,
        layer: str | None = None,
        obsm: str | None = None,
    ) -> Tensor:
        r"""Return where raw samples are at a time on their way to their images.

        .. math::
            x_t = (1 - t)\, x + t\, T(x), \qquad 0 \le t \le 1

        Between Gaussians this is the geodesic of Bures' metric; for every cost :math:`h(x - y)` with convex h straight
        lines are the shortest ways (McCann 1997, "A convexity principle for interacting gases"; Villani 2009, "Optimal
        Transport", chapter 7). On the sphere, for :class:`SphereMap` or ``cost="geodesic"``, they are great circles.
        For other costs the line is no more than a line.

        The way is one in the map's coordinates. Standardized features are decoded to the same line; with principal
        components, ``t=0`` gives the projection of ``x`` onto their span.

        Args:
            x: ``(n, d)`` samples, as in :meth:`transport`.
            t: A number from 0 to 1, or several.
            condition: Conditions, as in :meth:`transport`.
            batch_size: Rows that go through the network at once.
            layer: Layer of ``AnnData``, as in :meth:`transport`.
            obsm: Embedding of ``AnnData`` in place of a layer.

        Returns:
            ``(n, d)`` tensor, or ``(len(t), n, d)`` for several times, as in :meth:`transport`.

        Raises:
            TypeError: ``x`` is a path, or holds no real numbers.
            ValueError: As in :meth:`transport`; or ``t`` is not from 0 to 1, beyond which nothing was learned.

        Example:
            >>> import torch
            >>> from lightning_gap import MongeMap
            >>> from lightning_gap.monge import ResidualMLP
            >>> net, x = ResidualMLP(2, start="mean"), torch.randn(500, 2)
            >>> net.start(x, x + 4)
            >>> model = MongeMap(map=net)
            >>> torch.allclose(model.interpolate(x, 0.25), x + 1, atol=1e-5), model.interpolate(x, [0, 0.5, 1]).shape
            (True, torch.Size([3, 500, 2]))
        """
        return interpolate(cast("MongeMap", self), x, t, condition, batch_size=batch_size, layer=layer, obsm=obsm)
