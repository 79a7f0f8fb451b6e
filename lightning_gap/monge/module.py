"""The LightningModule that learns an optimal transport map."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_gap.loggers import define_axes
from lightning_gap.monge.costs import Cost, resolve
from lightning_gap.monge.gap import divergence_and_gap, sinkhorn_divergence
from lightning_gap.monge.maps import ResidualMLP
from lightning_gap.monge.samples import check_epsilon, check_pair
from lightning_gap.monge.sinkhorn import CostLike, check_solver, share_of_mean_cost
from lightning_gap.parallel import mean_over_ranks

__all__ = ["MongeMap"]

# The axis of all that is logged: updates behind the weights that are measured.
_UPDATES = "lightning_gap/monge/updates"


class MongeMap(LightningModule):
    r"""Learns a transport map between two sets of unpaired samples that is optimal for a cost.

    .. math::
        \min_T \; S_{\varepsilon_1}(T\sharp\mu, \nu) + \lambda\, M^c_{\varepsilon_2}(T)

    The Sinkhorn divergence fits the image of the source to the target; the Monge gap keeps the map optimal for the
    cost :math:`c` (Uscidda and Cuturi 2023, "The Monge Gap", section 3).

    A batch is a pair ``(source, target)`` of ``(n, d)`` and ``(m, d)`` tensors; :class:`SamplesDataModule` makes them.
    It logs ``lightning_gap/monge/{train,val,test}_{loss,sinkhorn_divergence,monge_gap,displacement}``, the gap in the
    paper's (Shannon) convention, whose floor is ``epsilon * log(n)``. With several devices each one compares its own
    batch.

    Args:
        dim: Dimension of the samples; taken from the data module where it is ``None``.
        cost: Ground cost :math:`c` of the Monge gap: a name, an instance from :mod:`lightning_gap.costs`, or a
            function.
        map: The network; a :class:`ResidualMLP` of widths ``hidden`` by default.
        hidden: Widths of the default network.
        fitting_cost: Ground cost of the Sinkhorn divergence.
        fitting_epsilon: Its regularization :math:`\varepsilon_1`, in units of the cost; by default 5 % of the mean
            cost within the first training batch's target, decided once, and kept in the checkpoint.
        gap_epsilon: Regularization :math:`\varepsilon_2` of the gap; by default 1 % of the mean cost between source
            and target of the first training batch, likewise.
        gap_weight: Weight :math:`\lambda \ge 0` of the Monge gap; at 0 the gap is only measured in validation.
        reach: Strength of the divergence's soft marginals, in units of its cost; ``None`` for balanced transport.
        optimizer: Makes the optimizer from the parameters; ``Adam(lr=1e-3)`` by default.
        lr_scheduler: Makes a scheduler from the optimizer, stepped after every update.
        solver: Solver of both terms, see :func:`sinkhorn_divergence`.

    Raises:
        ValueError: An argument is out of range.
        MisconfigurationException: Neither ``dim`` nor ``map`` is given, and the data do not tell.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gap import MongeMap, SamplesDataModule
        >>> data = SamplesDataModule(torch.randn(200, 2), torch.randn(200, 2) + 3, batch_size=100)
        >>> model = MongeMap(dim=2, cost="euclidean")
        >>> trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...                   enable_model_summary=False)
        >>> trainer.fit(model, data)
        >>> model.transport(torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """

    fitting_epsilon: Tensor
    gap_epsilon: Tensor

    def __init__(
        self,
        dim: int | None = None,
        *,
        cost: CostLike = "sqeuclidean",
        map: nn.Module | None = None,
        hidden: Sequence[int] = (128, 128, 128),
        fitting_cost: CostLike = "sqeuclidean",
        fitting_epsilon: float | None = None,
        gap_epsilon: float | None = None,
        gap_weight: float = 1.0,
        reach: float | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = partial(Adam, lr=1e-3),  # noqa: B008
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        solver: str = "auto",
    ) -> None:
        super().__init__()
        self.cost = _resolve("cost", cost)
        self.fitting_cost = _resolve("fitting_cost", fitting_cost)
        number = isinstance(gap_weight, int | float) and not isinstance(gap_weight, bool)
        if not (number and math.isfinite(gap_weight) and gap_weight >= 0):
            raise ValueError(f"gap_weight must be a finite number of at least 0, got {gap_weight!r}")
        self.gap_weight = float(gap_weight)
        self.reach = check_epsilon("reach", reach)
        self.solver = check_solver(solver)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.register_buffer("fitting_epsilon", _undecided(check_epsilon("fitting_epsilon", fitting_epsilon)))
        self.register_buffer("gap_epsilon", _undecided(check_epsilon("gap_epsilon", gap_epsilon)))
        self.map = map if map is not None else None if dim is None else ResidualMLP(dim, hidden)
        self.hidden = tuple(hidden)
        self.save_hyperparameters(
            {
                "dim": dim,
                "cost": str(self.cost),
                "hidden": list(hidden),
                "fitting_cost": str(self.fitting_cost),
                "fitting_epsilon": fitting_epsilon,
                "gap_epsilon": gap_epsilon,
                "gap_weight": self.gap_weight,
                "reach": self.reach,
                "solver": solver,
            }
        )

    def setup(self, stage: str) -> None:
        """Make the default network once the data have told their dimension."""
        if self.map is None:
            dim = getattr(getattr(self.trainer, "datamodule", None), "dim", None)
            if dim is None:
                raise MisconfigurationException(
                    "MongeMap has no network: give dim=, the dimension of the samples, or map=, a network"
                )
            self.map = ResidualMLP(dim, self.hidden)
            self.hparams["dim"] = dim

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Ask for the network where it was one of the user's own, which a checkpoint does not hold."""
        if self.map is None and any(name.startswith("map.") for name in checkpoint["state_dict"]):
            raise MisconfigurationException(
                "the checkpoint holds the weights of a network of your own, and not the network: "
                "give it again, as in MongeMap.load_from_checkpoint(path, map=...)"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, d)`` samples to ``(n, d)`` samples, differentiably."""
        if self.map is None:
            raise MisconfigurationException("MongeMap has no network yet: give dim= or map=, or fit it first")
        mapped = self.map(x)
        if not isinstance(mapped, Tensor) or mapped.shape != x.shape:
            got = tuple(mapped.shape) if isinstance(mapped, Tensor) else type(mapped).__name__
            raise ValueError(f"the map returned {got} for samples of shape {tuple(x.shape)}: it must keep the shape")
        return mapped.to(x.dtype)

    @torch.no_grad()
    def transport(self, x: Tensor | np.ndarray[Any, Any], *, batch_size: int = 65_536) -> Tensor:
        """Return the images of samples, in evaluation mode and without gradients.

        Args:
            x: ``(n, d)`` samples, a tensor on any device or an array.
            batch_size: Rows that go through the network at once.

        Returns:
            ``(n, d)`` tensor on the device of ``x``, in the precision of the network.

        Raises:
            ValueError: The shape is not ``(n, d)``, or ``batch_size`` is not positive.
        """
        x = x if isinstance(x, Tensor) else torch.tensor(np.asarray(x))
        if x.dim() != 2:
            raise ValueError(f"x must have shape (n, d), got {tuple(x.shape)}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        parameter = next(self.parameters(), torch.empty(0))
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            parts = [self(self._as_map_takes(part.to(parameter.device))).to(x.device) for part in x.split(batch_size)]
        finally:
            # Module by module: a layer that its owner froze in evaluation mode stays there.
            for module in training:
                module.training = True
        return torch.cat(parts)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the divergence plus the weighted gap, and log both."""
        source, target = self._unpack(batch)
        self._decide_epsilons(source, target)
        return self._terms("train", source, target, with_gap=self.gap_weight > 0)["loss"]

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log both terms on held-out samples."""
        self._terms("val", *self._unpack(batch), with_gap=True)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log both terms on test samples."""
        self._terms("test", *self._unpack(batch), with_gap=True)

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the images of the source samples."""
        return cast(Tensor, self(self._as_map_takes(batch if isinstance(batch, Tensor) else batch[0])))

    def configure_optimizers(self) -> Any:
        """Make the optimizer, and the scheduler which is stepped after every update."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def _terms(self, stage: str, source: Tensor, target: Tensor, *, with_gap: bool) -> dict[str, Tensor]:
        mapped = self(source)
        fitting_epsilon, gap_epsilon = _decided(self.fitting_epsilon), _decided(self.gap_epsilon)
        options: dict[str, Any] = {"reach": self.reach, "solver": self.solver}
        terms: dict[str, Tensor] = {}
        if with_gap:
            terms["sinkhorn_divergence"], terms["monge_gap"] = divergence_and_gap(
                source, mapped, target, fitting_cost=self.fitting_cost, fitting_epsilon=fitting_epsilon,
                cost=self.cost, gap_epsilon=gap_epsilon, **options,
            )  # fmt: skip
            terms["loss"] = terms["sinkhorn_divergence"] + self.gap_weight * terms["monge_gap"]
        else:
            terms["loss"] = terms["sinkhorn_divergence"] = sinkhorn_divergence(
                mapped, target, cost=self.fitting_cost, epsilon=fitting_epsilon, **options
            )
        logged = {f"lightning_gap/monge/{stage}_{name}": value.detach() for name, value in terms.items()}
        with torch.no_grad():
            logged[f"lightning_gap/monge/{stage}_displacement"] = self.cost.paired(source, mapped).mean()
        options = {"batch_size": len(source), "sync_dist": stage != "train"}
        if self._trainer is not None:
            define_axes(self._trainer.loggers, _UPDATES, logged)
            self.log(_UPDATES, float(self._trainer.global_step), reduce_fx="max", **options)
        self.log_dict(logged, **options)
        return terms

    def _unpack(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"a batch must be a pair (source, target) of (n, d) tensors, got {type(batch).__name__}: "
                "use SamplesDataModule, or a loader that yields such pairs"
            )
        source, target = batch
        check_pair("source", source, "target", target)
        return self._as_map_takes(source), self._as_map_takes(target)

    def _as_map_takes(self, x: Tensor) -> Tensor:
        """Return the samples in the precision of the network: NumPy's is double, and few networks are."""
        parameter = next(self.parameters(), None)
        dtype = parameter.dtype if parameter is not None else x.dtype
        return x.to(dtype if dtype.is_floating_point else torch.get_default_dtype())

    @torch.no_grad()
    def _decide_epsilons(self, source: Tensor, target: Tensor) -> None:
        # Once, so that the loss does not change under the optimizer's feet; in the checkpoint, so that a resumed run
        # goes on with the same.
        if not math.isfinite(float(self.fitting_epsilon)):
            _decide("fitting_epsilon", self.fitting_epsilon, 0.05, target, target, self.fitting_cost)
        if not math.isfinite(float(self.gap_epsilon)):
            _decide("gap_epsilon", self.gap_epsilon, 0.01, source, target, self.cost)


def _undecided(epsilon: float | None) -> Tensor:
    return torch.tensor(math.nan if epsilon is None else epsilon)


def _decide(name: str, epsilon: Tensor, share: float, x: Tensor, y: Tensor, cost: Cost) -> None:
    try:
        value = share_of_mean_cost(share, x, y, cost)
    except ValueError as error:
        raise ValueError(f"{name} cannot be decided from the first training batch: {error}, {name}=...") from error
    epsilon.fill_(mean_over_ranks(epsilon.new_tensor(value)))


def _resolve(name: str, cost: CostLike) -> Cost:
    try:
        return resolve(cost)
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}. A checkpoint holds only the name of a cost of your own: give it again, "
            f"as in MongeMap.load_from_checkpoint(path, {name}=...)"
        ) from error


def _decided(epsilon: Tensor) -> float | None:
    """Return the number, or ``None`` before the first training batch: each validation batch then takes its own."""
    value = float(epsilon)
    return value if math.isfinite(value) else None
