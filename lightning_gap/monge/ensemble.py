"""Several maps of one transport, and how far they agree."""

from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_gap.checks import check_integer
from lightning_gap.monge.dynamics import is_on_sphere
from lightning_gap.monge.fits import fitted
from lightning_gap.monge.map_files import read_maps, write_maps
from lightning_gap.monge.module import MongeMap
from lightning_gap.monge.samples.bootstrap import bootstrap as resampled
from lightning_gap.monge.samples.datamodule import SamplesDataModule
from lightning_gap.monge.trajectory import check_spaces

__all__ = ["MapEnsemble", "fit_ensemble"]


class MapEnsemble:
    r"""The mean image of several maps, and how far their images of each sample are apart.

    .. math::
        \bar T(x) = \frac1K \sum_k T_k(x), \qquad
        s(x) = \Big(\frac1K \sum_k |T_k(x) - \bar T(x)|^2\Big)^{1/2}

    A deep ensemble (Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep
    Ensembles"), of maps that differ by their initial weights, their batches and, with :func:`fit_ensemble`, by a
    bootstrap of their samples. The spread tells chance from what the data decide. It is a lower bound of the doubt: an
    error that all maps share, as that of a wrong cost or of a network that is too small, is not in it.

    The mean of optimal maps for the squared cost is one again: a sum of gradients of convex functions. For other
    structures and costs it need not be, and on the sphere it is divided by its norm.

    Args:
        maps: Fitted maps, or paths of their checkpoints, two at least.
        device: Where to put maps that are loaded.

    Raises:
        TypeError: A map is neither a :class:`MongeMap` nor a path.
        ValueError: There are less than two maps, or their spaces differ.

    Example:
        >>> import torch
        >>> from lightning_gap import MongeMap
        >>> from lightning_gap.monge import ResidualMLP
        >>> x, maps = torch.randn(500, 2), []
        >>> for shift in (2.0, 4.0):
        ...     net = ResidualMLP(2, start="mean")
        ...     net.start(x, x + torch.tensor([shift, 0.0]))
        ...     maps.append(MongeMap(map=net))
        >>> ensemble = MapEnsemble(maps)
        >>> torch.allclose(ensemble.transport(x), x + torch.tensor([3.0, 0.0]), atol=1e-5)
        True
        >>> round(float(ensemble.spread(x).mean()), 3)
        1.0
    """

    def __init__(self, maps: Sequence[MongeMap | str | Path], *, device: str | torch.device = "cpu") -> None:
        loaded: list[MongeMap] = []
        for k, given in enumerate(maps):
            if not isinstance(given, MongeMap | str | Path):
                raise TypeError(f"maps[{k}] must be a MongeMap or the path of a checkpoint, got {type(given).__name__}")
            model = given if isinstance(given, MongeMap) else MongeMap.load_from_checkpoint(given, map_location=device)
            if model.map is None:
                raise ValueError(f"maps[{k}] has no network yet: fit it first")
            loaded.append(model)
        if len(loaded) < 2:
            raise ValueError(f"maps has {len(loaded)} maps: a spread needs two at least")
        check_spaces(loaded)
        self.maps = loaded

    def __len__(self) -> int:
        return len(self.maps)

    def __repr__(self) -> str:
        return f"MapEnsemble({len(self.maps)} maps)"

    def to(self, device: str | torch.device) -> "MapEnsemble":
        """Move the maps to a device, and return the ensemble."""
        for model in self.maps:
            model.to(device)
        return self

    def images(self, x: Any, condition: Any = None, **options: Any) -> Tensor:
        """Return the ``(K, n, d)`` images of raw samples under each map.

        Args:
            x: ``(n, d)`` samples, as in :meth:`MongeMap.transport`.
            condition: Conditions, as there.
            **options: Of :meth:`MongeMap.transport`.
        """
        return torch.stack([model.transport(x, condition, **options) for model in self.maps])

    def transport(self, x: Any, condition: Any = None, **options: Any) -> Tensor:
        """Return the ``(n, d)`` mean images of raw samples; the arguments are those of :meth:`images`."""
        return self._center(self.images(x, condition, **options))

    def spread(self, x: Any, condition: Any = None, *, per_feature: bool = False, **options: Any) -> Tensor:
        """Return the root mean squared distance of each sample's images from their mean, in the units of the features.

        Args:
            x: ``(n, d)`` samples, as in :meth:`MongeMap.transport`.
            condition: Conditions, as there.
            per_feature: Whether to return that of each feature, ``(n, d)``, whose squares sum to the square of the
                ``(n,)`` spread.
            **options: Of :meth:`MongeMap.transport`.
        """
        images = self.images(x, condition, **options)
        squares = (images - self._center(images)).square().mean(0)
        return (squares if per_feature else squares.sum(-1)).sqrt()

    def save(self, path: str | Path) -> None:
        """Write all maps into one file, of tensors and plain Python alone.

        Args:
            path: The file.

        Raises:
            MisconfigurationException: A network is one of your own, which the file would not hold.
        """
        write_maps(path, "ensemble", self.maps)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu", **given: Any) -> "MapEnsemble":
        """Return the ensemble of a file. Nothing that it names is run but this package's maps.

        Args:
            path: A file that :meth:`save` wrote.
            device: Where to put the maps.
            **given: Arguments of every map that the file holds the name of only, such as a cost of your own.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or holds anything else.
        """
        return cls(read_maps(path, "ensemble", device, given)[0])

    def _center(self, images: Tensor) -> Tensor:
        center = images.mean(0)
        if is_on_sphere(self.maps[0]):
            center = torch.nn.functional.normalize(center, dim=-1)
        return center


def fit_ensemble(
    make_model: Callable[[], MongeMap],
    data: SamplesDataModule,
    n: int = 5,
    *,
    bootstrap: bool = True,
    make_trainer: Callable[[], Trainer] | None = None,
    max_steps: int = 1000,
) -> MapEnsemble:
    """Fit several maps to some data, each to a bootstrap of its training samples.

    Args:
        make_model: Makes each map; their weights differ by torch's random numbers.
        data: The samples; their held-out part and representation are the same for all maps.
        n: Number of maps, two at least.
        bootstrap: Whether each map sees training samples that are drawn from those of ``data`` with replacement, so
            that the spread holds what other samples would have given; otherwise all see the same ones.
        make_trainer: Makes each trainer; by default one that writes and shows nothing.
        max_steps: Updates of each fit with that trainer.

    Raises:
        TypeError: ``data`` is no :class:`SamplesDataModule`, ``make_model`` makes no :class:`MongeMap`, or a count is
            no integer.
        ValueError: A number is out of range, or ``make_model`` returned one map twice.

    Example:
        >>> import torch
        >>> from lightning_gap import MongeMap, SamplesDataModule
        >>> from lightning_gap.monge import ResidualMLP
        >>> _ = torch.manual_seed(0)
        >>> data = SamplesDataModule(torch.randn(200, 2), torch.randn(200, 2) + 3, batch_size=64)
        >>> ensemble = fit_ensemble(lambda: MongeMap(map=ResidualMLP(2)), data, n=2, max_steps=10)
        >>> ensemble.transport(torch.zeros(3, 2)).shape, ensemble.spread(torch.zeros(3, 2)).shape
        (torch.Size([3, 2]), torch.Size([3]))
    """
    if not isinstance(data, SamplesDataModule):
        raise TypeError(f"data must be a SamplesDataModule, got {type(data).__name__}")
    check_integer("n", n, 2)
    check_integer("max_steps", max_steps)
    maps: list[MongeMap] = []
    for k in range(n):
        again = resampled(data, k) if bootstrap else copy(data)
        again.seed = data.seed + 1 + k
        maps.append(fitted(make_model, again, make_trainer, max_steps))
    return MapEnsemble(maps)
