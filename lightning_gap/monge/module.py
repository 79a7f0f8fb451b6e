"""The LightningModule that learns an optimal transport map."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_gap.checks import check_integer, check_number, renamed
from lightning_gap.monge import from_data
from lightning_gap.monge.border import checked, mapped, predicted
from lightning_gap.monge.checkpoint import build, build_cost, hyper_parameters
from lightning_gap.monge.defaults import GivenTerms, cosine_over_run, recipe_for, say_choice
from lightning_gap.monge.dual_loss import check_convex
from lightning_gap.monge.epsilons import KeptEpsilons, given_epsilon
from lightning_gap.monge.held_out import HeldOut
from lightning_gap.monge.maps.base import TransportMap
from lightning_gap.monge.objective import FittingLoss, GapOn, MapObjective
from lightning_gap.monge.ot.checks import check_epsilon
from lightning_gap.monge.ot.compiling import eager
from lightning_gap.monge.ot.costs import Cost, CostLike, SqEuclidean
from lightning_gap.monge.ot.epsilon import FITTING_SHARE, GAP_SHARE
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.monge.samples.condition_encoding import ConditionEncoding
from lightning_gap.monge.samples.datamodule import SamplesDataModule
from lightning_gap.monge.samples.standardize import AffineRepresentation
from lightning_gap.monge.schedules import Schedule, number_or_schedule, stepped
from lightning_gap.monge.signs import Remarks
from lightning_gap.monge.suitability import check_costs, check_run, modules_of_cost
from lightning_gap.monge.training_log import TrainingLog
from lightning_gap.monge.training_loss import training_loss
from lightning_gap.monge.training_record import RECORD, TrainingRecord
from lightning_gap.monge.transporting import Transporting
from lightning_gap.monge.untrained import Untrained
from lightning_gap.trainer.internals.of_torch import apply_to_module

__all__ = ["MongeMap"]


class MongeMap(Transporting):
    r"""Learns a transport map between two sets of unpaired samples that is optimal for a cost.

    .. math::
        \min_T \; \Delta(T\sharp\mu, \nu) + \lambda\, M^c_{\rho, \varepsilon_2}(T) + \lambda_c\, C_\rho(F)

    The fitting loss :math:`\Delta`, by default the Sinkhorn divergence :math:`S_{\varepsilon_1}`, fits the image of the
    source to the target; the Monge gap keeps the map optimal for the cost :math:`c` (Uscidda and Cuturi 2023, "The
    Monge Gap", section 3); the conservativity :math:`C_\rho` keeps the vector field F of a structured map close to a
    gradient.

    A batch is an :class:`~lightning_gap.monge.UnpairedBatch`, or a pair ``(source, target)`` of ``(n, d)`` and
    ``(m, d)`` tensors; :class:`SamplesDataModule` makes them. With conditions the tensors are ``(K, n, d)`` and
    ``(K, m, d)``, and both terms means over the conditions. With several devices they are those of the global batch.

    In training it logs ``lightning_gap/monge/train_{loss,sinkhorn_divergence,monge_gap,displacement,marginal_error}``
    (in place of the divergence ``energy_distance``, or ``fitting_loss`` for one of your own; also ``conservativity``,
    and ``gap_weight`` and ``epsilon_factor`` where they change). In validation and tests it logs ``{val,test}_loss``
    and the scores of :class:`~lightning_gap.monge.MapScores` over all held-out samples. Monitor
    ``val_energy_distance``: images that are drawn together win a divergence in many dimensions. Gaps are in the paper's
    (Shannon) convention, whose floor is ``epsilon * log(n)``.

    Args:
        dim: Dimension of the samples; taken from the data module where it is ``None``.
        cost: Ground cost :math:`c` of the Monge gap: a name, an instance from :mod:`lightning_gap.costs`, or a
            function. By default the one that the map is made for, and ``"sqeuclidean"`` for a map that suits any.
        map: The network. By default, up to 128 dimensions, one that starts at an entropic plan of all training samples:
            a :class:`BrenierMap` for the squared Euclidean cost, a :class:`ConditionalMap` where the data have
            conditions, a :class:`ResidualMLP` for other costs; beyond, one that starts at the Gaussian map; and a
            :class:`SphereMap` for the geodesic cost. What was chosen is said at the start of a fit, and is in the
            hyperparameters.
        hidden: Widths of the default network.
        fitting_loss: :math:`\Delta`: ``"sinkhorn"``; ``"energy"``; ``"semidual"``, :func:`semidual` of a map with a
            convex potential, which draws no image to another; or a function of ``(n, d)`` images and ``(m, d)`` target
            samples (and of a keyword ``weights``, a pair, where there are weights). By default ``"semidual"`` for a
            :class:`BrenierMap`, ``"energy"`` for the other maps that were chosen, ``"sinkhorn"`` for those that were
            given, and where an argument of that divergence is.
        fitting_cost: Ground cost of the Sinkhorn divergence.
        fitting_epsilon: Its regularization :math:`\varepsilon_1`, in units of the cost; by default the share
            ``relative_fitting_epsilon`` of the typical cost within the target, decided once, and kept in the
            checkpoint. Typical is the mean but for outliers, of all training samples with their weights where a data
            module has them, and else of the first batch.
        gap_epsilon: Regularization :math:`\varepsilon_2` of the gap; by default the share ``relative_gap_epsilon`` of
            the typical cost between source and target, likewise.
        relative_fitting_epsilon: See ``fitting_epsilon``.
        relative_gap_epsilon: See ``gap_epsilon``.
        epsilon_factor: What both are multiplied by in training: a number, or a schedule of the updates so far such as
            ``Anneal(10, 1, updates=1000)``.
        gap_weight: Weight :math:`\lambda \ge 0` of the gap, or a schedule; at 0 it is only measured in validation. By
            default 0 for a :class:`BrenierMap`, whose gap is 0; for others that were chosen 0.1 mean distances for a
            mean cost between the samples, so that it suits any units; 1 for given ones.
        gap_reference: ``(r, d)`` samples, or a path to them, of a reference measure :math:`\rho` whose support covers
            the source's: a map that is optimal on it is optimal on the source. A step takes as many as of the source.
        gap_on: Where the gap is measured: on the ``"source"`` batch, on the ``"reference"`` (the default where there is
            one), or on ``"both"`` as one sample.
        conservative_weight: Weight :math:`\lambda_c \ge 0` of the conservativity of the map's ``field``.
        conservative_probes: Random probes of it a sample.
        rho: Strength :math:`\rho` of soft marginals, for unbalanced transport, in units of the fitting cost.
        reweight: Whether ``rho`` weighs the samples by the marginals of the unbalanced plan between source and target
            batch, in all terms, rather than softening the divergence's marginals.
        optimizer: Makes the optimizer from the parameters; ``Adam(lr=1e-3)`` by default, for
            a chosen map with a decay along a cosine, over the run but no more than twenty passes, or, but for the
            semi-dual, as many updates as there are samples, up to 500.
        lr_scheduler: Makes a scheduler, stepped after every update; ``ReduceLROnPlateau`` after every validation.
        lr_scheduler_monitor: The logged value that a ``ReduceLROnPlateau`` watches.
        solver: Solver of both terms, see :func:`sinkhorn_divergence`; not ``"exact"``, which has no epsilon.
        tolerance: L1 marginal error at which the solver stops. The gap is a difference of large terms: its gradient is
            known to twice this of the gradient of what is paid.
        max_iterations: Most sweeps of the solver. Where they do not suffice, the first time is warned of, and
            ``train_marginal_error`` tells how far the solver came.
        global_batch: Whether the terms are those of all devices' samples together, or each compares its own batch.
        representation: Encodes raw samples and decodes images; this and the next four are taken from the data module.
        condition_names: Names of the conditions, by label.
        feature_names: Names of the raw samples' features, in the map's order, to which tables are matched by name.
        condition_encoding: How named columns, such as drug and dose, become the vectors that are conditions.
        condition_range: Least and greatest trained value of each entry of vectors that are conditions, two sequences.
            Images under vectors far outside are warned of.
        reach: Old name of ``rho``.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, the map is made for another cost, or a cost is to be learned.
        MisconfigurationException: Neither ``dim`` nor ``map`` is given, and the data do not tell.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gap import MongeMap, SamplesDataModule
        >>> data = SamplesDataModule(torch.randn(200, 2), torch.randn(200, 2) + 3, batch_size=100)
        >>> model = MongeMap()
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
        cost: CostLike | None = None,
        map: nn.Module | None = None,
        hidden: Sequence[int] | None = None,
        fitting_loss: FittingLoss | None = None,
        fitting_cost: CostLike = "sqeuclidean",
        fitting_epsilon: float | None = None,
        gap_epsilon: float | None = None,
        relative_fitting_epsilon: float = FITTING_SHARE,
        relative_gap_epsilon: float = GAP_SHARE,
        epsilon_factor: float | Schedule = 1.0,
        gap_weight: float | Schedule | None = None,
        gap_reference: str | Path | ArrayLike | Tensor | None = None,
        gap_on: GapOn | None = None,
        conservative_weight: float = 0.0,
        conservative_probes: int = 1,
        rho: float | None = None,
        reweight: bool = False,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        lr_scheduler_monitor: str = "lightning_gap/monge/val_energy_distance",
        solver: Solver = "auto",
        tolerance: float = 1e-5,
        max_iterations: int = 2000,
        global_batch: bool = True,
        representation: AffineRepresentation | Mapping[str, Any] | None = None,
        condition_names: Sequence[str] | None = None,
        feature_names: Sequence[str] | None = None,
        condition_encoding: ConditionEncoding | Mapping[str, Any] | None = None,
        condition_range: Sequence[Sequence[float]] | None = None,
        reach: float | None = None,
    ) -> None:
        super().__init__()
        fitting = given_epsilon("fitting_epsilon", fitting_epsilon, relative_fitting_epsilon)
        self.epsilons = KeptEpsilons(self, fitting, given_epsilon("gap_epsilon", gap_epsilon, relative_gap_epsilon))
        self.epsilon_factor = number_or_schedule("epsilon_factor", build("epsilon_factor", epsilon_factor), above=0)
        self.conservative_weight = check_number("conservative_weight", conservative_weight, least=0)
        self.conservative_probes = check_integer("conservative_probes", conservative_probes)
        reference, self.reference_features, gap_on = from_data.read_reference(gap_reference, gap_on)
        gap_reference = None  # Lightning compares each argument with the hyperparameters, which arrays do not bear
        self.register_buffer("gap_reference", reference)
        # A description stands for it in a checkpoint, which the signature does not tell: command lines would take any.
        given = build("map", map) if isinstance(map, Mapping) else map
        made_for = given.made_for if isinstance(given, TransportMap) else None
        ground = build_cost("cost", cost if cost is not None else made_for or "sqeuclidean")
        self.map = from_data.chosen_map(dim, given, ground, hidden)
        self.map_is_chosen = given is None
        softened = renamed("reach", "rho", reach, rho)
        self.given = GivenTerms(
            fitting_loss=fitting_loss is not None,
            gap_weight=gap_weight is not None,
            optimizer=optimizer is not None or lr_scheduler is not None,
            sinkhorn=(softened is not None and not reweight) or fitting.absolute is not None
            or relative_fitting_epsilon != FITTING_SHARE or build_cost("fitting_cost", fitting_cost) != SqEuclidean(),
            reference=reference is not None,
            reweight=bool(reweight),
        )  # fmt: skip
        recipe = recipe_for(self.map, ground, self.given, chosen=self.map_is_chosen)
        weight = recipe.gap_weight if gap_weight is None else build("gap_weight", gap_weight)
        self.gap_weight = number_or_schedule("gap_weight", weight, least=0)
        self.objective = MapObjective(
            cost=ground,
            fitting_cost=build_cost("fitting_cost", fitting_cost),
            fitting_loss=recipe.fitting_loss if fitting_loss is None else build("fitting_loss", fitting_loss),
            rho=check_epsilon("rho", softened),
            reweight=bool(reweight),
            gap_on=gap_on,
            options=SolverOptions(solver, tolerance, max_iterations),
        )
        self.global_batch = bool(global_batch)
        self.decays = recipe.decays or (given is not map and not self.given.optimizer)
        self.optimizer = partial(Adam, lr=recipe.lr) if optimizer is None else build("optimizer", optimizer)
        self.lr_scheduler = build("lr_scheduler", lr_scheduler)
        self.lr_scheduler_monitor = lr_scheduler_monitor
        self.hidden = None if hidden is None else tuple(hidden)
        encodes = AffineRepresentation(**representation) if isinstance(representation, Mapping) else representation
        self.representation = encodes
        self.condition_encoding = from_data.encoding_from(condition_encoding)
        self.condition_names = None if condition_names is None else [str(name) for name in condition_names]
        self.feature_names = from_data.feature_texts(feature_names, dim if self.representation is None else None)
        self.condition_range = None if condition_range is None else [[float(x) for x in end] for end in condition_range]
        check_costs(self, of_checkpoint=isinstance(map, Mapping))
        self.scores = nn.ModuleDict()
        self.held_out = HeldOut(self)
        self.training_log = TrainingLog()
        self.record = TrainingRecord()
        self.remarks = Remarks()
        self.untrained = Untrained()
        self._began = False
        self.save_hyperparameters(hyper_parameters(self, dim, given))

    @property
    def cost(self) -> Cost:
        """Ground cost of the Monge gap."""
        return self.objective.cost

    @property
    def fitting_cost(self) -> Cost:
        """Ground cost of the fitting divergence."""
        return self.objective.fitting_cost

    @property
    def rho(self) -> float | None:
        """Strength of soft marginals, or ``None``."""
        return self.objective.rho

    @property
    def reach(self) -> float | None:
        """Old name of :attr:`rho`."""
        return self.rho

    @property
    def solver(self) -> Solver:
        """Solver of both terms."""
        return self.objective.options.solver

    # --- the data, and what a checkpoint knows of them ---

    @override
    def setup(self, stage: str) -> None:
        """Take from the data what was not given: the representation, names, the default network."""
        self.epsilons.read()
        from_data.adopt(self)
        check_run(self)
        if stage == "fit":
            self.remarks.of_a_new_fit()
            self.training_log.of_a_new_fit()
            check_costs(self)
            check_convex(self)
            from_data.note_conditions(self)
            self.record.of_a_fit(getattr(self.trainer, "datamodule", None))

    @override
    def configure_callbacks(self) -> list[Any]:
        """Take from the data what was not given, before callbacks that average weights copy the module; add none."""
        if isinstance(getattr(self.trainer, "datamodule", None), SamplesDataModule):
            from_data.adopt(self)  # others may know what they hold after their setup only
        return []

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Ask for the network where it was one of the user's own, which a checkpoint does not hold."""
        from_data.take_from_checkpoint(self, checkpoint)
        self.record.load(checkpoint.get(RECORD))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep this module's epsilons where a callback put averaged weights in the place of its state."""
        self.epsilons.write_to(checkpoint.get("state_dict", {}))
        checkpoint[RECORD] = self.record.state()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MongeMap":
        # Networks that a cost is computed by go where this module goes, and are no part of its state.
        for cost in (self.cost, self.fitting_cost):
            for module in modules_of_cost(cost):
                apply_to_module(module, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    # --- the map ---

    @override
    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map encoded ``(n, d)`` samples, under their conditions if the map is conditional, differentiably."""
        return mapped(self.map, x, condition)

    # --- the loops ---

    @override
    def configure_optimizers(self) -> Any:
        """Make the optimizer, and the scheduler, which is stepped after every update, or after every validation."""
        optimizer = self.optimizer(list(self.parameters()) or self.untrained.parameters(self))
        made = self.lr_scheduler(optimizer) if self.lr_scheduler is not None else cosine_over_run(self, optimizer)
        if made is None:
            return optimizer
        scheduler = stepped(made, self.lr_scheduler_monitor, self)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    @override
    def on_fit_start(self) -> None:
        """Let the map start from all training samples, and decide the epsilons from them, once."""
        self._began = from_data.begin(self)
        if self.map_is_chosen:
            self.remarks.once("choice", lambda: say_choice(self))

    @override
    @eager
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the fitting loss plus the weighted regularizers, and log all."""
        b = checked(self, batch)
        if not (self._began and self.epsilons.started):  # finders of rates and batches take the state back
            self._began = from_data.begin_with_batch(self, b)
        loss, values = training_loss(self, b, batch_idx)
        self.training_log.keep(self, values)
        return self.untrained.loss(loss)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.record.updates = self.global_step
        self.training_log.write(self.trainer)
        self.untrained.end(self.trainer)

    @override
    def on_train_end(self) -> None:
        """Keep the epsilons where averages were copied over the weights."""
        self.epsilons.restore()

    @override
    def on_validation_epoch_start(self) -> None:
        self.held_out.forget("val")

    @override
    @eager
    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.held_out.keep("val", batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self.held_out.log("val")

    @override
    def on_test_epoch_start(self) -> None:
        self.held_out.forget("test")

    @override
    @eager
    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.held_out.keep("test", batch)

    @override
    def on_test_epoch_end(self) -> None:
        self.held_out.log("test")

    @override
    @eager
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the raw images of raw source samples, or of the encoded source of an :class:`UnpairedBatch`."""
        return predicted(self, batch)
