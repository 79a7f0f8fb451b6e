"""The LightningModule that learns an optimal transport map."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast, get_args, overload

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_gap.arguments import check_count, check_number
from lightning_gap.compiling import eager
from lightning_gap.loggers import define_axes
from lightning_gap.monge.batches import UnpairedBatch
from lightning_gap.monge.conditional import ConditionalMap
from lightning_gap.monge.conditions import conditions_of
from lightning_gap.monge.conservativity import conservativity
from lightning_gap.monge.costs import Cost, resolve
from lightning_gap.monge.files import open_table, read_matrix
from lightning_gap.monge.maps import ResidualMLP
from lightning_gap.monge.objective import FittingLoss, GapOn, MapObjective
from lightning_gap.monge.populations import FiniteSamples, Turn
from lightning_gap.monge.representation import AffineRepresentation
from lightning_gap.monge.samples import check_epsilon, check_samples
from lightning_gap.monge.schedules import Schedule
from lightning_gap.monge.scores import MapScores
from lightning_gap.monge.sinkhorn import CostLike, check_solver, share_of_mean_cost
from lightning_gap.monge.specification import build, describe
from lightning_gap.monge.splits import generator
from lightning_gap.parallel import RankGroup, data_parallel_group, data_parallel_rank, data_parallel_size

__all__ = ["MongeMap"]

_UPDATES = "lightning_gap/monge/updates"
_PROBES = 1  # first entry of the key of random draws
_LOSS_NAMES = {"sinkhorn": "sinkhorn_divergence", "energy": "energy_distance"}


class MongeMap(LightningModule):
    r"""Learns a transport map between two sets of unpaired samples that is optimal for a cost.

    .. math::
        \min_T \; \Delta(T\sharp\mu, \nu) + \lambda\, M^c_{\rho, \varepsilon_2}(T) + \lambda_c\, C_\rho(F)

    The fitting loss :math:`\Delta`, by default the Sinkhorn divergence :math:`S_{\varepsilon_1}`, fits the image of the
    source to the target; the Monge gap keeps the map optimal for the cost :math:`c` (Uscidda and Cuturi 2023, "The
    Monge Gap", section 3); the conservativity :math:`C_\rho` keeps the vector field F of a structured map close to a
    gradient.

    A batch is an :class:`~lightning_gap.monge.UnpairedBatch`, or a pair ``(source, target)`` of ``(n, d)`` and
    ``(m, d)`` tensors; :class:`SamplesDataModule` makes them. With conditions it holds ``(K, n, d)`` and ``(K, m, d)``
    tensors, and both terms are means over the conditions. With several devices both terms are those of the global
    batch.

    In training it logs ``lightning_gap/monge/train_{loss,sinkhorn_divergence,monge_gap,displacement}`` (in place of the
    divergence ``energy_distance``, or ``fitting_loss`` for one of your own; also ``conservativity``, and ``gap_weight``
    and ``epsilon_factor`` where they change). In validation and tests it logs ``{val,test}_loss`` and the scores of
    :class:`~lightning_gap.monge.MapScores` over all held-out samples; monitor ``val_sinkhorn_divergence`` or
    ``val_energy_distance``. Gaps are in the paper's (Shannon) convention, whose floor is ``epsilon * log(n)``.

    Args:
        dim: Dimension of the samples; taken from the data module where it is ``None``.
        cost: Ground cost :math:`c` of the Monge gap: a name, an instance from :mod:`lightning_gap.costs`, or a
            function.
        map: The network; by default a :class:`ResidualMLP` of widths ``hidden``, or a :class:`ConditionalMap` where the
            data have conditions.
        hidden: Widths of the default network.
        fitting_loss: :math:`\Delta`: ``"sinkhorn"``, ``"energy"``, or a function of ``(n, d)`` images and ``(m, d)``
            target samples (and of a keyword ``weights``, a pair, where there are weights).
        fitting_cost: Ground cost of the Sinkhorn divergence.
        fitting_epsilon: Its regularization :math:`\varepsilon_1`, in units of the cost; by default the share
            ``relative_fitting_epsilon`` of the mean cost within the first training batch's target, decided once, and
            kept in the checkpoint.
        gap_epsilon: Regularization :math:`\varepsilon_2` of the gap; by default the share ``relative_gap_epsilon`` of
            the mean cost between source and target of the first training batch, likewise.
        relative_fitting_epsilon: See ``fitting_epsilon``.
        relative_gap_epsilon: See ``gap_epsilon``.
        epsilon_factor: What both are multiplied by in training: a number, or a schedule of the updates so far such as
            ``Anneal(10, 1, updates=1000)``.
        gap_weight: Weight :math:`\lambda \ge 0` of the Monge gap, or a schedule; at 0 the gap is only measured in
            validation.
        gap_reference: ``(r, d)`` samples, or a path to them, of a reference measure :math:`\rho` whose support covers
            the source's: a map that is optimal on it is optimal on the source. Each step takes as many of them as it
            has source samples.
        gap_on: Where the gap is measured: on the ``"source"`` batch, on the ``"reference"`` (the default where there is
            one), or on ``"both"`` as one sample.
        conservative_weight: Weight :math:`\lambda_c \ge 0` of the conservativity of the map's ``field``.
        conservative_probes: Random probes of it a sample.
        reach: Strength of soft marginals, in units of the fitting cost, for unbalanced transport; ``None`` for hard
            ones.
        reweight: Whether ``reach`` weighs the samples by the marginals of the unbalanced plan between source and target
            batch, in all terms, rather than softening the divergence's marginals.
        optimizer: Makes the optimizer from the parameters; ``Adam(lr=1e-3)`` by default.
        lr_scheduler: Makes a scheduler from the optimizer, stepped after every update.
        solver: Solver of both terms, see :func:`sinkhorn_divergence`; not ``"exact"``, which has no epsilon.
        global_batch: Whether, with several devices, the terms are those of all devices' samples together; otherwise
            each device compares its own batch.
        representation: Encodes raw samples and decodes images; taken from the data module.
        condition_names: Names of the conditions, by label; taken from the data module.

    Raises:
        TypeError: An argument has the wrong type.
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
    started: Tensor
    gap_reference: Tensor | None

    def __init__(
        self,
        dim: int | None = None,
        *,
        cost: CostLike = "sqeuclidean",
        map: nn.Module | None = None,
        hidden: Sequence[int] = (128, 128, 128),
        fitting_loss: FittingLoss = "sinkhorn",
        fitting_cost: CostLike = "sqeuclidean",
        fitting_epsilon: float | None = None,
        gap_epsilon: float | None = None,
        relative_fitting_epsilon: float = 0.05,
        relative_gap_epsilon: float = 0.01,
        epsilon_factor: float | Schedule = 1.0,
        gap_weight: float | Schedule = 1.0,
        gap_reference: str | Path | ArrayLike | Tensor | None = None,
        gap_on: GapOn | None = None,
        conservative_weight: float = 0.0,
        conservative_probes: int = 1,
        reach: float | None = None,
        reweight: bool = False,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        solver: str = "auto",
        global_batch: bool = True,
        representation: AffineRepresentation | Mapping[str, Any] | None = None,
        condition_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.gap_weight = _number_or_schedule("gap_weight", build("gap_weight", gap_weight), least=0)
        self.epsilon_factor = _number_or_schedule("epsilon_factor", build("epsilon_factor", epsilon_factor), above=0)
        self.conservative_weight = check_number("conservative_weight", conservative_weight, least=0)
        self.conservative_probes = check_count("conservative_probes", conservative_probes)
        self.relative_fitting_epsilon = check_number("relative_fitting_epsilon", relative_fitting_epsilon, above=0)
        self.relative_gap_epsilon = check_number("relative_gap_epsilon", relative_gap_epsilon, above=0)
        if reweight and reach is None:
            raise ValueError(
                "reweight=True needs reach, the strength of the soft marginals: give reach=..., or neither"
            )
        if reach is not None and not reweight and fitting_loss != "sinkhorn":
            raise ValueError(
                "reach softens the marginals of the Sinkhorn divergence only: give reweight=True for another "
                "fitting_loss, or leave reach out"
            )
        if check_solver(solver) == "exact":
            raise ValueError(
                "solver='exact' has no epsilon, and MongeMap trains with one: leave it out, and score a trained map by "
                "monge_gap(x, model.transport(x), solver='exact')"
            )
        reference = _reference(gap_reference)
        gap_on = gap_on or ("source" if reference is None else "reference")
        if gap_on not in get_args(GapOn):
            raise ValueError(f"gap_on must be one of {', '.join(get_args(GapOn))}, got {gap_on!r}")
        if gap_on != "source" and reference is None:
            raise ValueError(f"gap_on={gap_on!r} needs gap_reference, samples of the reference measure: give them")
        self.objective = MapObjective(
            cost=_resolve("cost", cost),
            fitting_cost=_resolve("fitting_cost", fitting_cost),
            fitting_loss=_fitting_loss(build("fitting_loss", fitting_loss)),
            reach=check_epsilon("reach", reach),
            reweight=bool(reweight),
            gap_on=gap_on,
            solver=solver,
        )
        self.global_batch = bool(global_batch)
        self.optimizer = partial(Adam, lr=1e-3) if optimizer is None else build("optimizer", optimizer)
        self.lr_scheduler = build("lr_scheduler", lr_scheduler)
        self.register_buffer("fitting_epsilon", _undecided(check_epsilon("fitting_epsilon", fitting_epsilon)))
        self.register_buffer("gap_epsilon", _undecided(check_epsilon("gap_epsilon", gap_epsilon)))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("gap_reference", reference)
        # A description stands for it in a checkpoint, which the signature does not tell: command lines would take any.
        given = build("map", map) if isinstance(map, Mapping) else map
        made_with = getattr(given, "dim", None)
        if dim is not None and isinstance(made_with, int) and made_with != dim:
            raise ValueError(f"dim={dim}, but the map was made with dim={made_with}: leave dim out, the map tells it")
        described = _described_map(given)
        self.map = given if given is not None else None if dim is None else ResidualMLP(dim, hidden)
        self.hidden = tuple(hidden)
        self.representation = (
            AffineRepresentation(**representation) if isinstance(representation, Mapping) else representation
        )
        self.condition_names = None if condition_names is None else [str(name) for name in condition_names]
        self.scores = nn.ModuleDict()
        gap_reference = None  # Lightning compares each argument with the dictionary, which arrays do not bear.
        self.save_hyperparameters(
            {
                # Of a network that is not described, nothing is made in its place.
                "dim": dim if given is None or described is not None else None,
                "cost": str(self.cost),
                "map": described,
                "hidden": list(hidden),
                "fitting_loss": fitting_loss
                if isinstance(fitting_loss, str)
                else describe(self.objective.fitting_loss),
                "fitting_cost": str(self.fitting_cost),
                "fitting_epsilon": fitting_epsilon,
                "gap_epsilon": gap_epsilon,
                "relative_fitting_epsilon": self.relative_fitting_epsilon,
                "relative_gap_epsilon": self.relative_gap_epsilon,
                "epsilon_factor": _described_schedule(self.epsilon_factor),
                "gap_weight": _described_schedule(self.gap_weight),
                "gap_reference": None if reference is None else {"shape": list(reference.shape)},
                "gap_on": gap_on,
                "conservative_weight": self.conservative_weight,
                "conservative_probes": self.conservative_probes,
                "reach": self.reach,
                "reweight": self.objective.reweight,
                "optimizer": describe(self.optimizer),
                "lr_scheduler": describe(self.lr_scheduler),
                "solver": solver,
                "global_batch": self.global_batch,
                "representation": None if self.representation is None else self.representation.hparams,
                "condition_names": self.condition_names,
            }
        )

    @property
    def cost(self) -> Cost:
        """Ground cost of the Monge gap."""
        return self.objective.cost

    @property
    def fitting_cost(self) -> Cost:
        """Ground cost of the fitting divergence."""
        return self.objective.fitting_cost

    @property
    def reach(self) -> float | None:
        """Strength of soft marginals, or ``None``."""
        return self.objective.reach

    @property
    def solver(self) -> str:
        """Solver of both terms."""
        return self.objective.solver

    # --- what the data tell ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take from the data what was not given: the representation, the names of conditions, the default network."""
        if str(self.trainer.precision) in ("16-true", "bf16-true"):
            raise MisconfigurationException(
                f"precision={self.trainer.precision!r} would round epsilons and the representation to sixteen bits: "
                "use 'bf16-mixed' or '16-mixed', where the network alone is in half precision"
            )
        data = getattr(self.trainer, "datamodule", None)
        self._adopt_representation(data)
        names = getattr(data, "condition_names", ())
        if names and self.condition_names is None:
            self.condition_names = [str(name) for name in names]
            self.hparams["condition_names"] = self.condition_names
        self._check_condition_names(data)
        if self.map is None:
            dim = getattr(data, "dim", None)
            if dim is None:
                raise MisconfigurationException(
                    "MongeMap has no network: give dim=, the dimension of the samples, or map=, a network"
                )
            self.map = _default_map(data, dim, self.hidden)
            self.hparams["dim"] = dim
            self.hparams["map"] = _described_map(self.map)
        if self.conservative_weight and not isinstance(getattr(self.map, "field", None), nn.Module):
            raise MisconfigurationException(
                f"conservative_weight={self.conservative_weight:g} regularizes the vector field of a structured map, "
                f"and {type(self.map).__name__} has none: give map=StructuredMap(...), or conservative_weight=0"
            )

    def _check_condition_names(self, data: Any) -> None:
        """Refuse labels that mean other conditions than in training; vectors mean the same everywhere."""
        names = [str(name) for name in getattr(data, "condition_names", ())]
        mine = self.condition_names or []
        if getattr(data, "condition_vectors", None) is None and names != mine[: len(names)]:
            raise MisconfigurationException(
                f"the labels of the data mean the conditions {', '.join(names)}, and those of this map "
                f"{', '.join(mine)}: give the data module the same conditions, or condition_vectors"
            )

    def _adopt_representation(self, data: Any) -> None:
        theirs = getattr(data, "representation", None)
        if self.representation is None:
            if theirs is not None and bool(self.started):
                raise MisconfigurationException(
                    "this map was trained on raw samples, and the data module encodes them: give "
                    "SamplesDataModule(standardize=False, components=None), or train a new map"
                )
            if theirs is not None:
                self.representation = AffineRepresentation(**theirs.hparams).to(self.device)
                self.representation.load_state_dict(theirs.state_dict())
                self.hparams["representation"] = theirs.hparams
            return
        if data is not None and not self.representation.agrees_with(theirs):
            raise MisconfigurationException(
                "the data module encodes samples otherwise than in this map's training: give it the samples, the "
                "split and the options of then"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Ask for the network where it was one of the user's own, which a checkpoint does not hold."""
        state = checkpoint["state_dict"]
        if self.map is None and any(name.startswith("map.") for name in state):
            raise MisconfigurationException(
                "the checkpoint holds the weights of a network of your own, and not the network: "
                "give it again, as in MongeMap.load_from_checkpoint(path, map=...)"
            )
        # Older checkpoints were trained without a start.
        state.setdefault("started", torch.tensor(True))

    def on_fit_start(self) -> None:
        """Let the map start from all training samples, once."""
        data = getattr(self.trainer, "datamodule", None)
        if not bool(self.started) and data is not None and hasattr(data, "training_samples"):
            self._start(*data.training_samples())

    @torch.no_grad()
    def _start(self, source: Tensor, target: Tensor) -> None:
        start = getattr(self.map, "start", None)
        if callable(start):
            start(*(self._as_map_takes(part.flatten(0, -2).to(self.device)) for part in (source, target)))
        self.started.fill_(True)

    # --- the map --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map encoded ``(n, d)`` samples to ``(n, d)`` samples, differentiably.

        Args:
            x: ``(n, d)`` samples.
            condition: ``(n,)`` labels or ``(n, p)`` vectors, for a conditional map.
        """
        if self.map is None:
            raise MisconfigurationException("MongeMap has no network yet: give dim= or map=, or fit it first")
        if getattr(self.map, "conditional", False):
            if condition is None:
                raise ValueError("this map is conditional: give condition=, a label or a vector for each sample")
            mapped = self.map(x, condition)
        else:
            mapped = self.map(x)
        if not isinstance(mapped, Tensor) or mapped.shape != x.shape:
            got = tuple(mapped.shape) if isinstance(mapped, Tensor) else type(mapped).__name__
            raise ValueError(f"the map returned {got} for samples of shape {tuple(x.shape)}: it must keep the shape")
        return mapped.to(x.dtype)

    @torch.no_grad()
    def transport(self, x: Tensor | np.ndarray[Any, Any], condition: Any = None, *, batch_size: int = 65_536) -> Tensor:
        """Return the images of raw samples, in evaluation mode and without gradients.

        Args:
            x: ``(n, d)`` samples: a tensor on any device, an array, a sparse matrix or a data frame.
            condition: For a conditional map, one condition for all samples or one for each: names, labels, or vectors.
            batch_size: Rows that go through the network at once.

        Returns:
            ``(n, d)`` tensor on the device of ``x``, in the precision of the network.

        Raises:
            ValueError: The shape is not ``(n, d)``, ``batch_size`` is not positive, or the condition is not known.
        """
        x = x if isinstance(x, Tensor) else read_matrix("x", x)
        if x.dim() != 2:
            raise ValueError(f"x must have shape (n, d), got {tuple(x.shape)}")
        check_count("batch_size", batch_size)
        each = self._conditions(condition, len(x))
        device = next(self.parameters(), torch.empty(0)).device
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            rows = x.split(batch_size)
            conditions = [None] * len(rows) if each is None else each.to(device).split(batch_size)
            parts = [
                self._raw_images(part.to(device), c).to(x.device) for part, c in zip(rows, conditions, strict=True)
            ]
        finally:
            # Module by module: a layer that its owner froze in evaluation mode stays there.
            for module in training:
                module.training = True
        return torch.cat(parts)

    def _raw_images(self, x: Tensor, condition: Tensor | None) -> Tensor:
        if self.representation is None:
            return cast(Tensor, self(self._as_map_takes(x), condition))
        encoded = self.representation.encode(x)
        return self._decoded(self(self._as_map_takes(encoded), condition))

    def _decoded(self, images: Tensor) -> Tensor:
        return images if self.representation is None else self._as_map_takes(self.representation.decode(images))

    def _conditions(self, condition: Any, n: int) -> Tensor | None:
        """Return a condition for each of n samples."""
        if condition is None:
            return None
        if not getattr(self.map, "conditional", False):
            raise ValueError(f"condition={condition!r} was given, and this map has no conditions: leave it out")
        vector_dim = getattr(self.map, "condition_dim", None)
        each = conditions_of(condition, n, self.condition_names or (), vector_dim=vector_dim)
        return self._as_map_takes(each) if each.is_floating_point() else each

    # --- the loops ------------------------------------------------------------------------------------------------

    @eager
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the fitting loss plus the weighted regularizers, and log all."""
        b = self._unpack(batch)
        group = data_parallel_group(self.trainer) if self.global_batch else None
        source, target = _gathered(b.source, group), _gathered(b.target, group)
        self._begin(b)
        gap_weight, factor = _now(self.gap_weight, self.global_step), _now(self.epsilon_factor, self.global_step)
        mapped = self._images(b.source, b.condition)
        with_gap = gap_weight > 0
        reference = self._reference_pair(b, batch_idx, group) if with_gap else None
        loss, gap = self.objective(
            source,
            _gathered(mapped, group),
            target,
            fitting_epsilon=float(self.fitting_epsilon) * factor,
            gap_epsilon=float(self.gap_epsilon) * factor,
            weights=(_gathered(b.source_weights, group, -1), _gathered(b.target_weights, group, -1)),
            reference=reference,
            with_gap=with_gap,
        )
        logged = {_LOSS_NAMES.get(cast(str, self.objective.fitting_loss), "fitting_loss"): loss}
        total = loss
        if gap is not None:
            logged["monge_gap"] = gap
            total = total + gap_weight * gap
        if self.conservative_weight:
            field = cast(nn.Module, cast(nn.Module, self.map).field)
            flat, condition = _flat(b.source, b.condition)
            # By epoch, batch and rank, so that a resumed run draws the same.
            draws = generator(0, _PROBES, self.current_epoch, batch_idx, data_parallel_rank(self.trainer))
            logged["conservativity"] = conservativity(
                field, flat, condition, probes=self.conservative_probes, generator=draws
            )
            total = total + self.conservative_weight * logged["conservativity"]
        logged["loss"] = total
        with torch.no_grad():
            logged["displacement"] = _displacement(self.cost, b.source, mapped, b.source_weights)
        for name, value in (("gap_weight", self.gap_weight), ("epsilon_factor", self.epsilon_factor)):
            if callable(value):
                logged[name] = torch.tensor(gap_weight if name == "gap_weight" else factor, device=self.device)
        self._log_step(logged, batch_idx, source.shape[-2])
        return total

    def on_validation_epoch_start(self) -> None:
        """Forget what a validation that was interrupted has left."""
        self._forget_scores("val")

    @eager
    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Keep held-out samples and their images."""
        self._score("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all held-out samples."""
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        """Forget what a test that was interrupted has left."""
        self._forget_scores("test")

    @eager
    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Keep test samples and their images."""
        self._score("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log the scores of all test samples."""
        self._log_scores("test")

    @eager
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the raw images of raw source samples, or of the encoded source of an :class:`UnpairedBatch`."""
        if isinstance(batch, Tensor):
            return self._raw_images(batch, None)
        if isinstance(batch, UnpairedBatch):
            b = self._checked(batch)
            return self._decoded(self._images(b.source, b.condition))
        return self._raw_images(batch[0], batch[1] if getattr(self.map, "conditional", False) else None)

    def configure_optimizers(self) -> Any:
        """Make the optimizer, and the scheduler which is stepped after every update."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    # --- pieces ---------------------------------------------------------------------------------------------------

    def _images(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return cast(Tensor, self(*_flat(x, condition))).view(x.shape)

    def _reference_pair(
        self, batch: UnpairedBatch, batch_idx: int, group: RankGroup | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return reference samples, as many as the batch has of the source, and their images."""
        if self.objective.gap_on == "source":
            return None
        assert self.gap_reference is not None
        here, ranks = (0, 1) if group is None else (data_parallel_rank(self.trainer), data_parallel_size(self.trainer))
        n = batch.source.shape[-2]
        # By epoch and batch, so that a resumed run sees the same, and no one else's random numbers change.
        turn = Turn((0,), self.current_epoch, batch_idx, 0, ranks * n, slice(here * n, (here + 1) * n))
        rows = FiniteSamples(self.gap_reference).rows(turn)[turn.part]
        samples = self.gap_reference[rows.to(self.gap_reference.device)]
        if self.representation is not None:
            samples = self.representation.encode(samples)
        samples = self._as_map_takes(samples)
        if batch.source.dim() == 3:
            samples = samples.expand(len(batch.source), *samples.shape)
        return _gathered(samples, group), _gathered(self._images(samples, batch.condition), group)

    def _new_scores(self, *, named: bool) -> MapScores:
        scores = MapScores(
            cost=self.cost,
            fitting_cost=self.fitting_cost,
            fitting_epsilon=_decided(self.fitting_epsilon),
            gap_epsilon=_decided(self.gap_epsilon),
            reach=None if self.objective.reweight else self.reach,
            solver=self.solver,
            conditions=self.condition_names if named else None,
        )
        return scores.to(self.device)

    def _forget_scores(self, stage: str) -> None:
        if stage in self.scores:
            del self.scores[stage]

    def _score(self, stage: str, batch: Sequence[Tensor]) -> None:
        b = self._unpack(batch)
        mapped = self._images(b.source, b.condition)
        if stage not in self.scores:
            self.scores[stage] = self._new_scores(named=b.condition is not None and not b.condition.is_floating_point())
            self._losses: list[Tensor] = []
        if self.objective.fitting_loss not in _LOSS_NAMES:
            loss, _ = self.objective(
                b.source,
                mapped,
                b.target,
                fitting_epsilon=_decided(self.fitting_epsilon),
                gap_epsilon=None,
                with_gap=False,
                weights=(b.source_weights, b.target_weights),
            )
            self._losses.append(loss)
        cast(MapScores, self.scores[stage]).update(
            b.source,
            mapped,
            b.target,
            source_weights=b.source_weights,
            target_weights=b.target_weights,
            parts_of=self._sizes_of_whole(b),
            condition=b.condition,
            true_images=b.true_images,
            target_again=b.target_again,
        )

    def _sizes_of_whole(self, b: UnpairedBatch) -> tuple[int, int] | None:
        """Return the sizes of the batch whose weights this process has a part of; ``None`` where it has all."""
        group = data_parallel_group(self.trainer)
        if group is None or (b.source_weights is None and b.target_weights is None):
            return None
        n, m = group.sum(torch.tensor([b.source.shape[-2], b.target.shape[-2]], device=self.device)).tolist()
        return n, m

    def _log_scores(self, stage: str) -> None:
        if stage not in self.scores:  # not a single batch
            return
        # They keep all samples: until here, and no longer.
        values = cast(MapScores, self.scores.pop(stage)).compute()
        name = _LOSS_NAMES.get(cast(str, self.objective.fitting_loss))
        if name is None:
            values["fitting_loss"] = torch.stack(self._losses).mean()
        gap_weight = _now(self.gap_weight, self.global_step)
        values["loss"] = values[name or "fitting_loss"] + gap_weight * values["monge_gap"]
        self._log(stage, values, sync_dist=True)

    def _log_step(self, values: Mapping[str, Tensor], batch_idx: int, batch_size: int) -> None:
        # log() takes longer than the network: it describes each value anew, and moves what it knows to its device. From
        # an epoch's second batch on only the numbers are new.
        results, named = _results_of(self.trainer), self._named("train", values)
        keys = [f"training_step.{name}" for name in named]
        if not batch_idx or results is None or not all(key in results for key in keys):
            self._log("train", values, batch_size=batch_size)
            return
        for key, value in zip(keys, named.values(), strict=True):
            results.update_metrics(key, value, batch_size)

    def _log(self, stage: str, values: Mapping[str, Tensor], **options: Any) -> None:
        logged = self._named(stage, values)
        define_axes(self.trainer.loggers, _UPDATES, logged)
        # Of an epoch's updates the last, not their mean.
        self.log(_UPDATES, logged.pop(_UPDATES), reduce_fx="max", **options)
        self.log_dict(logged, **options)

    def _named(self, stage: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values by the names under which they are logged, and the updates so far."""
        named = {f"lightning_gap/monge/{stage}_{name}": value.detach() for name, value in values.items()}
        return named | {_UPDATES: torch.tensor(float(self.global_step), device=self.device)}

    def _unpack(self, batch: Sequence[Tensor]) -> UnpairedBatch:
        if not isinstance(batch, UnpairedBatch):
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise ValueError(
                    f"a batch must be an UnpairedBatch or a pair (source, target) of (n, d) tensors, got "
                    f"{type(batch).__name__}: use SamplesDataModule, or a loader that yields such batches"
                )
            return self._checked(UnpairedBatch(*batch))
        return self._checked(batch)

    def _checked(self, batch: UnpairedBatch) -> UnpairedBatch:
        source, target = batch.source, batch.target
        for name, samples in (("source", source), ("target", target)):
            if isinstance(samples, Tensor) and samples.dim() == 3:
                check_samples(name, samples.flatten(0, 1))
            else:
                check_samples(name, samples)
        if (
            source.dim() != target.dim()
            or source.shape[-1] != target.shape[-1]
            or source.shape[:-2] != target.shape[:-2]
        ):
            raise ValueError(
                f"source has shape {tuple(source.shape)} but target {tuple(target.shape)}: all but the numbers of "
                "samples must agree"
            )
        floats = {
            name: self._as_map_takes(value)
            for name, value in batch._asdict().items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return batch._replace(**floats)

    def _as_map_takes(self, x: Tensor) -> Tensor:
        """Return the samples in the precision of the network: NumPy's is double, and few networks are."""
        parameter = next(self.parameters(), None)
        dtype = parameter.dtype if parameter is not None else x.dtype
        return x.to(dtype if dtype.is_floating_point else torch.get_default_dtype())

    def _begin(self, b: UnpairedBatch) -> None:
        """Start the map and decide the epsilons from the first batch of all devices, so that all begin alike."""
        if bool(self.started) and None not in (_decided(self.fitting_epsilon), _decided(self.gap_epsilon)):
            return
        group = data_parallel_group(self.trainer)
        source, target = _gathered(b.source, group), _gathered(b.target, group)
        if not bool(self.started):
            self._start(source, target)
        self._decide_epsilons(source, target)

    @torch.no_grad()
    def _decide_epsilons(self, source: Tensor, target: Tensor) -> None:
        # Once, so that the loss does not change under the optimizer's feet; in the checkpoint, so that a resumed run
        # goes on with the same.
        if not math.isfinite(float(self.fitting_epsilon)):
            share = self.relative_fitting_epsilon
            _decide("fitting_epsilon", self.fitting_epsilon, share, target, target, self.fitting_cost)
        if not math.isfinite(float(self.gap_epsilon)):
            _decide("gap_epsilon", self.gap_epsilon, self.relative_gap_epsilon, source, target, self.cost)


def _flat(x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return samples of K conditions as rows, with the condition of each."""
    if x.dim() == 2:
        return x, condition
    return x.flatten(0, 1), None if condition is None else condition.repeat_interleave(x.shape[1], dim=0)


@overload
def _gathered(samples: Tensor, group: RankGroup | None, dim: int = -2) -> Tensor: ...
@overload
def _gathered(samples: Tensor | None, group: RankGroup | None, dim: int = -2) -> Tensor | None: ...
def _gathered(samples: Tensor | None, group: RankGroup | None, dim: int = -2) -> Tensor | None:
    return samples if group is None or samples is None else group.gather_rows(samples, dim)


def _displacement(cost: Cost, source: Tensor, mapped: Tensor, weights: Tensor | None) -> Tensor:
    paid = cost.paired(source.reshape(-1, source.shape[-1]), mapped.reshape(-1, mapped.shape[-1]))
    if weights is None:
        return paid.mean()
    return ((paid.view(weights.shape) * weights).sum(-1) / weights.sum(-1)).mean()


def _results_of(trainer: Trainer) -> Any:
    """Return what the trainer has been told by ``log``; ``None`` where this Lightning keeps it elsewhere."""
    results = getattr(trainer, "_results", None)
    return results if hasattr(results, "update_metrics") else None


def _default_map(data: Any, dim: int, hidden: Sequence[int]) -> nn.Module:
    names, vectors = getattr(data, "condition_names", ()), getattr(data, "condition_vectors", None)
    if vectors is not None:
        return ConditionalMap(dim, condition_dim=vectors.shape[1], hidden=hidden)
    return ConditionalMap(dim, conditions=len(names), hidden=hidden) if names else ResidualMLP(dim, hidden)


def _described_map(given: nn.Module | None) -> dict[str, Any] | None:
    described = describe(given)
    # A network of one's own is asked for when its weights are there: see on_load_checkpoint.
    return described if described is not None and "class_path" in described else None


def _described_schedule(value: float | Schedule) -> Any:
    return describe(value) if callable(value) else value


def _reference(samples: Any) -> Tensor | None:
    if samples is None:
        return None
    if isinstance(samples, Mapping):  # of a checkpoint, whose state holds the samples
        return torch.zeros(samples["shape"])
    return open_table("gap_reference", samples).samples(None)


def _fitting_loss(loss: Any) -> FittingLoss:
    if not (callable(loss) or loss in _LOSS_NAMES):
        raise ValueError(f"fitting_loss must be one of {', '.join(_LOSS_NAMES)}, or a function, got {loss!r}")
    return cast(FittingLoss, loss)


def _number_or_schedule(
    name: str, value: Any, *, least: float | None = None, above: float | None = None
) -> float | Schedule:
    return cast(Schedule, value) if callable(value) else check_number(name, value, least=least, above=above)


def _now(value: float | Schedule, updates: int) -> float:
    return float(value(updates)) if callable(value) else value


def _undecided(epsilon: float | None) -> Tensor:
    return torch.tensor(math.nan if epsilon is None else epsilon)


def _decide(name: str, epsilon: Tensor, share: float, x: Tensor, y: Tensor, cost: Cost) -> None:
    pairs = [(x, y)] if x.dim() == 2 else list(zip(x, y, strict=True))
    try:
        epsilon.fill_(fmean(share_of_mean_cost(share, x_k, y_k, cost) for x_k, y_k in pairs))
    except ValueError as error:
        raise ValueError(f"{name} cannot be decided from the first training batch: {error}, {name}=...") from error


def _resolve(name: str, cost: CostLike) -> Cost:
    try:
        return resolve(cost)
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}. A checkpoint holds only the name of a cost of your own: give it again, "
            f"as in MongeMap.load_from_checkpoint(path, {name}=...)"
        ) from error


def _decided(epsilon: Tensor) -> float | None:
    """Return the number, or ``None`` before the first training batch: scores then take their own."""
    value = float(epsilon)
    return value if math.isfinite(value) else None
