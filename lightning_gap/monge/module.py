"""The LightningModule that learns an optimal transport map."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Self, cast, get_args, overload

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_gap.checks import check_count, check_number
from lightning_gap.monge.checkpoint import build, describe
from lightning_gap.monge.checkpoint_files import check_hyper_parameters, hyper_parameters_of
from lightning_gap.monge.epsilons import Decisions, Weighted, by_condition, few_of, share_of_typical_cost
from lightning_gap.monge.maps.conditional import ConditionalMap
from lightning_gap.monge.maps.conservativity import conservativity
from lightning_gap.monge.maps.networks import check_labels
from lightning_gap.monge.maps.residual import ResidualMLP, TransportMap
from lightning_gap.monge.objective import FittingLoss, GapOn, MapObjective, ObjectiveTerms
from lightning_gap.monge.ot.checks import check_all_samples, check_epsilon
from lightning_gap.monge.ot.compiling import eager
from lightning_gap.monge.ot.costs import Cost, CostLike, resolve
from lightning_gap.monge.ot.options import Solver, SolverOptions
from lightning_gap.monge.ot.result import ConvergenceWarning
from lightning_gap.monge.samples.batches import UnpairedBatch
from lightning_gap.monge.samples.conditions import conditions_of
from lightning_gap.monge.samples.datamodule import SamplesDataModule
from lightning_gap.monge.samples.draws import FiniteSamples, Turn
from lightning_gap.monge.samples.features import feature_places, listed, match_features
from lightning_gap.monge.samples.files.read import open_table, read_matrix
from lightning_gap.monge.samples.files.table import refuse_not_finite
from lightning_gap.monge.samples.splits import generator
from lightning_gap.monge.samples.standardize import AffineRepresentation
from lightning_gap.monge.schedules import Schedule
from lightning_gap.monge.scores.map_scores import MapScores
from lightning_gap.monge.signs import drawn_together, out_of_range
from lightning_gap.monge.suitability import check_costs_of_map, modules_of_cost, refuse_learned_cost
from lightning_gap.ranks.group import RankGroup
from lightning_gap.trainer.loggers import define_axes
from lightning_gap.trainer.strategy import data_parallel_group, data_parallel_rank, data_parallel_size, from_rank_zero

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
        map: The network; by default a :class:`ResidualMLP` of widths ``hidden``, or a :class:`ConditionalMap` where the
            data have conditions.
        hidden: Widths of the default network.
        fitting_loss: :math:`\Delta`: ``"sinkhorn"``, ``"energy"``, or a function of ``(n, d)`` images and ``(m, d)``
            target samples (and of a keyword ``weights``, a pair, where there are weights).
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
        lr_scheduler: Makes a scheduler from the optimizer, stepped after every update; ``ReduceLROnPlateau`` after
            every validation.
        lr_scheduler_monitor: The logged value that a ``ReduceLROnPlateau`` watches.
        solver: Solver of both terms, see :func:`sinkhorn_divergence`; not ``"exact"``, which has no epsilon.
        tolerance: L1 marginal error at which the solver stops. The gap is a difference of large terms: its gradient is
            known to twice this of the gradient of what is paid.
        max_iterations: Most sweeps of the solver. Where they do not suffice, the first time is warned of, and
            ``train_marginal_error`` tells how far the solver came.
        global_batch: Whether, with several devices, the terms are those of all devices' samples together; otherwise
            each device compares its own batch.
        representation: Encodes raw samples and decodes images; taken from the data module.
        condition_names: Names of the conditions, by label; taken from the data module.
        feature_names: Names of the raw samples' features, in the map's order; taken from the data module. Tables are
            matched to them by name, whatever their order.
        condition_range: Least and greatest value in training of each entry of vectors that are conditions, two
            sequences; taken from the data module. Images under vectors far outside are warned of.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, the map is made for another cost, or a cost is to be learned.
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
        cost: CostLike | None = None,
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
        lr_scheduler_monitor: str = "lightning_gap/monge/val_energy_distance",
        solver: Solver = "auto",
        tolerance: float = 1e-5,
        max_iterations: int = 2000,
        global_batch: bool = True,
        representation: AffineRepresentation | Mapping[str, Any] | None = None,
        condition_names: Sequence[str] | None = None,
        feature_names: Sequence[str] | None = None,
        condition_range: Sequence[Sequence[float]] | None = None,
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
        options = SolverOptions(solver, tolerance, max_iterations)
        if options.solver == "exact":
            raise ValueError(
                "solver='exact' has no epsilon, and MongeMap trains with one: leave it out, and score a trained map by "
                "monge_gap(x, model.transport(x), solver='exact')"
            )
        reference, self._reference_features = _reference(gap_reference)
        gap_on = gap_on or ("source" if reference is None else "reference")
        if gap_on not in get_args(GapOn):
            raise ValueError(f"gap_on must be one of {', '.join(get_args(GapOn))}, got {gap_on!r}")
        if gap_on != "source" and reference is None:
            raise ValueError(f"gap_on={gap_on!r} needs gap_reference, samples of the reference measure: give them")
        # A description stands for it in a checkpoint, which the signature does not tell: command lines would take any.
        given = build("map", map) if isinstance(map, Mapping) else map
        made_for = given.made_for if isinstance(given, TransportMap) else None
        self.objective = MapObjective(
            cost=_resolve("cost", cost if cost is not None else made_for or "sqeuclidean"),
            fitting_cost=_resolve("fitting_cost", fitting_cost),
            fitting_loss=_fitting_loss(build("fitting_loss", fitting_loss)),
            reach=check_epsilon("reach", reach),
            reweight=bool(reweight),
            gap_on=gap_on,
            solver=options.solver,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        self._converged = True
        self.global_batch = bool(global_batch)
        self.optimizer = partial(Adam, lr=1e-3) if optimizer is None else build("optimizer", optimizer)
        self.lr_scheduler = build("lr_scheduler", lr_scheduler)
        self.lr_scheduler_monitor = lr_scheduler_monitor
        self.register_buffer("fitting_epsilon", _undecided(check_epsilon("fitting_epsilon", fitting_epsilon)))
        self.register_buffer("gap_epsilon", _undecided(check_epsilon("gap_epsilon", gap_epsilon)))
        self.register_buffer("started", torch.zeros(()))  # a number, for callbacks that average buffers
        self._given = {"fitting_epsilon": fitting_epsilon is not None, "gap_epsilon": gap_epsilon is not None}
        self._decisions = Decisions(self, ("fitting_epsilon", "gap_epsilon", "started"))
        self._began = False
        self._said: set[str] = set()
        self.register_buffer("gap_reference", reference)
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
        self.feature_names = _feature_names(feature_names, dim if self.representation is None else None)
        self.condition_range = None if condition_range is None else [[float(x) for x in end] for end in condition_range]
        for name in ("cost", "fitting_cost"):
            refuse_learned_cost(name, getattr(self, name))
        if not isinstance(map, Mapping):  # a checkpoint of a pair that was trained can still be used
            self._check_costs()
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
                "lr_scheduler_monitor": self.lr_scheduler_monitor,
                "solver": solver,
                "tolerance": self.objective.tolerance,
                "max_iterations": max_iterations,
                "global_batch": self.global_batch,
                "representation": None if self.representation is None else self.representation.hparams,
                "condition_names": self.condition_names,
                "feature_names": self.feature_names,
                "condition_range": self.condition_range,
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
    def solver(self) -> Solver:
        """Solver of both terms."""
        return self.objective.solver

    # --- what the data tell ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take from the data what was not given: the representation, names, the default network."""
        if str(self.trainer.precision) in ("16-true", "bf16-true"):
            raise MisconfigurationException(
                f"precision={self.trainer.precision!r} would round epsilons and the representation to sixteen bits: "
                "use 'bf16-mixed' or '16-mixed', where the network alone is in half precision"
            )
        data = getattr(self.trainer, "datamodule", None)
        self._adopt(data)
        if self.map is None:
            raise MisconfigurationException(
                "MongeMap has no network: give dim=, the dimension of the samples, or map=, a network"
            )
        if stage == "fit":
            self._said.clear()
            self._check_costs()
            names = getattr(data, "condition_names", ())
            if names:
                self._say_if_conditions_are_unused()
            self._note_condition_range(getattr(data, "trained_vectors", None))
        if self.conservative_weight and not isinstance(getattr(self.map, "field", None), nn.Module):
            raise MisconfigurationException(
                f"conservative_weight={self.conservative_weight:g} regularizes the vector field of a structured map, "
                f"and {type(self.map).__name__} has none: give map=StructuredMap(...), or conservative_weight=0"
            )

    def configure_callbacks(self) -> list[Any]:
        """Take from the data what was not given, before callbacks that average weights copy the module; add none."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SamplesDataModule):  # others may know what they hold after their setup only
            self._adopt(data)
        return []

    def _adopt(self, data: Any) -> None:
        self._adopt_features(data)
        self._adopt_representation(data)
        names = getattr(data, "condition_names", ())
        if names and self.condition_names is None:
            self.condition_names = [str(name) for name in names]
            self.hparams["condition_names"] = self.condition_names
        self._check_condition_names(data)
        dim = getattr(data, "dim", None)
        if self.map is None and dim is not None:
            self.map = _default_map(data, dim, self.hidden)
            self.hparams["dim"] = dim
            self.hparams["map"] = _described_map(self.map)

    def _check_costs(self) -> None:
        counts = callable(self.gap_weight) or self.gap_weight > 0
        check_costs_of_map(self.map, self.cost, self.fitting_cost, gap_counts=counts)

    def _say_if_conditions_are_unused(self) -> None:
        if not getattr(self.map, "conditional", False) and "conditions" not in self._said:
            self._said.add("conditions")
            rank_zero_warn(
                f"the data have conditions, and {type(self.map).__name__} takes none: it is trained as one map for all "
                "of them. Give a conditional map, such as ConditionalMap(dim, conditions=...), or data without "
                "conditions"
            )

    def _adopt_features(self, data: Any) -> None:
        """Take the features' names from the data, or have the data give them in the map's order."""
        names = getattr(data, "feature_names", None)
        # A map that was trained by place has no names; other data than it was trained on cannot tell them.
        if (
            self.feature_names is None
            and names is not None
            and (self.trainer.state.fn == TrainerFn.FITTING or not self._decisions["started"])
        ):
            self.feature_names = [str(name) for name in names]
            self.hparams["feature_names"] = self.feature_names
        match_features(data, self.feature_names)
        places = feature_places("gap_reference", self._reference_features, self.feature_names, "the map")
        if places is not None and self.gap_reference is not None:
            self.gap_reference = self.gap_reference[:, torch.from_numpy(places).to(self.gap_reference.device)]
            self._reference_features = tuple(self.feature_names or ())
            self.hparams["gap_reference"] = {"shape": list(self.gap_reference.shape)}

    def _note_condition_range(self, vectors: Tensor | None) -> None:
        """Widen the range of trained conditions to that of this fit."""
        if vectors is None:
            return
        ends = [vectors.amin(0).tolist(), vectors.amax(0).tolist()]
        if self.condition_range is not None and len(self.condition_range[0]) == len(ends[0]):
            wider = zip((min, max), self.condition_range, ends, strict=True)
            ends = [list(map(choose, before, now)) for choose, before, now in wider]
        self.condition_range = ends
        self.hparams["condition_range"] = ends

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
            if theirs is not None and self._decisions["started"]:
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
        state = checkpoint.get("state_dict", {})  # a strategy that shards models has loaded it already
        if self.map is None and any(name.startswith("map.") for name in state):
            raise MisconfigurationException(
                "the checkpoint holds the weights of a network of your own, and not the network: "
                "give it again, as in MongeMap.load_from_checkpoint(path, map=...)"
            )
        # Older checkpoints were trained without a start.
        state.setdefault("started", torch.tensor(True))
        if getattr(self, "_trainer", None) is not None:
            self._adopt_names(checkpoint.get("hyper_parameters") or {})

    def _adopt_names(self, found: Mapping[str, Any]) -> None:
        """Take features and conditions as the checkpoint's weights mean them, where it is a trainer that loads them."""
        data = getattr(self.trainer, "datamodule", None)
        if found.get("feature_names"):
            self.feature_names = [str(name) for name in found["feature_names"]]
            self.hparams["feature_names"] = self.feature_names
            match_features(data, self.feature_names)
        if found.get("condition_names"):
            self.condition_names = [str(name) for name in found["condition_names"]]
            self.hparams["condition_names"] = self.condition_names
            self._check_condition_names(data)

    @_restricted_classmethod
    def load_from_checkpoint(
        cls,  # noqa: N805
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return the map of a checkpoint. Nothing that the file names is imported or called but this package's maps.

        Args:
            checkpoint_path: A path or a URL, or an open file.
            map_location: Where to put the weights; by default where they were.
            hparams_file: A YAML or CSV file of hyperparameters, instead of the checkpoint's.
            strict: Whether the weights must be those of the network, no more and no less.
            weights_only: Whether the file may hold no more than tensors and plain Python, as by default; ``False`` is
                for a file that you trust as you trust a program.
            **kwargs: Arguments that go before those of the checkpoint, such as a network of your own.

        Raises:
            ValueError: The checkpoint asks for anything else.
        """
        if weights_only is not False:
            weights_only = True
            check_hyper_parameters(hyper_parameters_of(checkpoint_path))
            # Lightning's own function would import the classes that are named beside it.
            kwargs["_instantiator"] = None
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict=strict, weights_only=weights_only, **kwargs
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep this module's epsilons where a callback put averaged weights in the place of its state."""
        self._decisions.write_to(checkpoint.get("state_dict", {}))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MongeMap":
        # Networks that a cost is computed by go where this module goes, and are no part of its state.
        for cost in (self.cost, self.fitting_cost):
            for module in modules_of_cost(cost):
                module._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def on_fit_start(self) -> None:
        """Let the map start from all training samples, and decide the epsilons from them, once."""
        self._began = False
        self._decisions.read()
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "training_samples"):
            return
        pairs = self._training_pairs(data)
        if pairs:
            self._begin(pairs, "the training samples", data.training_samples)

    def on_train_end(self) -> None:
        """Keep the epsilons where averages were copied over the weights."""
        self._decisions.restore()

    def _training_pairs(self, data: Any) -> list[tuple[Weighted, Weighted]]:
        """Return all training samples; nothing where all is decided and they would have to be drawn."""
        if self._is_decided() and getattr(data, "endless", False):
            return []
        if hasattr(data, "training_pairs"):
            return [(Weighted(x.samples, x.weights), Weighted(y.samples, y.weights)) for x, y in data.training_pairs()]
        source, target = data.training_samples()
        return by_condition((source, None), (target, None))

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

        Columns of a data frame and genes of ``AnnData`` are matched to :attr:`feature_names` by name, in whatever order
        they are; further ones are ignored with a warning. Tensors and arrays go by place.

        Args:
            x: ``(n, d)`` samples: a tensor on any device, an array, a sparse matrix, a data frame or ``AnnData``.
            condition: For a conditional map, one condition for all samples or one for each: names, labels, or vectors.
            batch_size: Rows that go through the network at once.
            layer: Layer of ``AnnData``; ``X`` by default where there is no layer, ``"X"`` where there are some.
            obsm: Embedding of ``AnnData`` in place of a layer.

        Returns:
            ``(n, d)`` tensor on the device of ``x``, in the precision of the network, with the features in the map's
            order.

        Raises:
            TypeError: ``x`` is a path, or holds no real numbers.
            ValueError: The shape is not ``(n, d)``, a feature is missing, a sample is not finite (the rows are named),
                ``batch_size`` is not positive, or the condition is not known.
        """
        x = x if isinstance(x, Tensor) else read_matrix("x", x, self.feature_names, layer=layer, obsm=obsm)
        if x.dim() != 2:
            raise ValueError(f"x must have shape (n, d), got {tuple(x.shape)}")
        if self.feature_names is not None and x.shape[1] != len(self.feature_names):
            raise ValueError(
                f"x has {x.shape[1]} columns, and the map takes {len(self.feature_names)} features "
                f"({listed(self.feature_names)}): they must agree"
            )
        refuse_not_finite("x", x, features=self.feature_names)
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
        labels = getattr(self.map, "conditions", None) is not None
        each = conditions_of(condition, n, self.condition_names or (), vector_dim=vector_dim, labels=labels)
        self._say_if_out_of_range(each)
        return self._as_map_takes(each) if each.is_floating_point() else each

    def _say_if_out_of_range(self, vectors: Tensor) -> None:
        if self.condition_range is not None and (message := out_of_range(vectors, self.condition_range)):
            rank_zero_warn(message)

    # --- the loops ------------------------------------------------------------------------------------------------

    @eager
    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the fitting loss plus the weighted regularizers, and log all."""
        b = self._unpack(batch)
        group = data_parallel_group(self.trainer) if self.global_batch else None
        source, target = _gathered(b.source, group), _gathered(b.target, group)
        if not (self._began and self._decisions["started"]):  # finders of rates and batches take the state back
            self._begin_from(b)
        gap_weight, factor = _now(self.gap_weight, self.global_step), _now(self.epsilon_factor, self.global_step)
        mapped = self._images(b.source, b.condition)
        with_gap = gap_weight > 0
        reference = self._reference_pair(b, batch_idx, group) if with_gap else None
        terms = self.objective.terms(
            source,
            _gathered(mapped, group),
            target,
            fitting_epsilon=self._decisions["fitting_epsilon"] * factor,
            gap_epsilon=self._decisions["gap_epsilon"] * factor,
            weights=(_gathered(b.source_weights, group, -1), _gathered(b.target_weights, group, -1)),
            reference=reference,
            with_gap=with_gap,
        )
        loss, gap = terms.loss, terms.gap
        self._tell_convergence(terms)
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
        if terms.marginal_error == terms.marginal_error:
            logged["marginal_error"] = torch.tensor(terms.marginal_error, device=self.device)
        with torch.no_grad():
            logged["displacement"] = _displacement(self.cost, b.source, mapped, b.source_weights)
        for name, value in (("gap_weight", self.gap_weight), ("epsilon_factor", self.epsilon_factor)):
            if callable(value):
                logged[name] = self._on_device(gap_weight if name == "gap_weight" else factor)
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
            refuse_not_finite("a batch", batch, features=self.feature_names)
            return self._raw_images(batch, None)
        if isinstance(batch, UnpairedBatch):
            b = self._checked(batch)
            return self._decoded(self._images(b.source, b.condition))
        condition = batch[1] if getattr(self.map, "conditional", False) else None
        self._check_labels(condition)
        if condition is not None:
            self._say_if_out_of_range(condition)
        return self._raw_images(batch[0], condition)

    def configure_optimizers(self) -> Any:
        """Make the optimizer, and the scheduler, which is stepped after every update, or after every validation."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        stepped: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
        if isinstance(scheduler, ReduceLROnPlateau):
            every = self.trainer.check_val_every_n_epoch or 1
            stepped |= {"interval": "epoch", "frequency": every, "monitor": self.lr_scheduler_monitor}
        return {"optimizer": optimizer, "lr_scheduler": stepped}

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
            fitting_epsilon=self._decisions.decided("fitting_epsilon"),
            gap_epsilon=self._decisions.decided("gap_epsilon"),
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
                fitting_epsilon=self._decisions.decided("fitting_epsilon"),
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
        scores = cast(MapScores, self.scores.pop(stage))
        values = scores.compute()
        name = _LOSS_NAMES.get(cast(str, self.objective.fitting_loss))
        if name is None:
            values["fitting_loss"] = torch.stack(self._losses).mean()
        gap_weight = _now(self.gap_weight, self.global_step)
        values["loss"] = values[name or "fitting_loss"] + gap_weight * values["monge_gap"]
        self._log(stage, values, sync_dist=True)
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._say_if_drawn_together(scores, values)

    def _say_if_drawn_together(self, scores: MapScores, values: Mapping[str, Tensor]) -> None:
        if self.objective.fitting_loss != "sinkhorn" or "drawn together" in self._said:
            return
        if message := drawn_together(scores, values):
            self._said.add("drawn together")
            rank_zero_warn(message)

    def _tell_convergence(self, terms: ObjectiveTerms) -> None:
        """Warn of the first step whose transport problems were not solved to the tolerance."""
        if terms.converged or not self._converged:
            return
        self._converged = False
        rank_zero_warn(
            f"at update {self.global_step} the solver stopped with a marginal error of {terms.marginal_error:.2g}, "
            f"above tolerance={self.objective.tolerance:.2g}, so the gradient is less exact than that: raise "
            f"max_iterations ({self.objective.max_iterations} now) or the epsilons; "
            "lightning_gap/monge/train_marginal_error tells of the later steps",
            category=ConvergenceWarning,
        )

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
        return named | {_UPDATES: self._on_device(float(self.global_step))}

    def _on_device(self, value: float) -> Tensor:
        # Filled there, and not copied to it.
        return torch.full((), value, dtype=torch.get_default_dtype(), device=self.device)

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
        check_all_samples(
            {
                name: samples.flatten(0, 1) if isinstance(samples, Tensor) and samples.dim() == 3 else samples
                for name, samples in (("source", source), ("target", target))
            }
        )
        if (
            source.dim() != target.dim()
            or source.shape[-1] != target.shape[-1]
            or source.shape[:-2] != target.shape[:-2]
        ):
            raise ValueError(
                f"source has shape {tuple(source.shape)} but target {tuple(target.shape)}: all but the numbers of "
                "samples must agree"
            )
        self._check_labels(batch.condition)
        floats = {
            name: self._as_map_takes(value)
            for name, value in batch._asdict().items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return batch._replace(**floats)

    def _check_labels(self, condition: Tensor | None) -> None:
        """Refuse unknown labels, once a batch: on a GPU the map itself does not wait to look at them."""
        conditions = getattr(self.map, "conditions", None)
        if isinstance(conditions, int) and isinstance(condition, Tensor) and not condition.is_floating_point():
            check_labels(condition, conditions)

    def _as_map_takes(self, x: Tensor) -> Tensor:
        """Return the samples in the precision of the network: NumPy's is double, and few networks are."""
        parameter = next(self.parameters(), None)
        dtype = parameter.dtype if parameter is not None else x.dtype
        return x.to(dtype if dtype.is_floating_point else torch.get_default_dtype())

    def _begin_from(self, b: UnpairedBatch) -> None:
        """Start the map and decide the epsilons from the first batch of all devices, so that all begin alike."""
        group = data_parallel_group(self.trainer)
        source, target = _gathered(b.source, group), _gathered(b.target, group)
        a, c = (_gathered(w, group, -1) for w in (b.source_weights, b.target_weights))
        if b.condition is not None:
            self._say_if_conditions_are_unused()
        self._begin(by_condition((source, a), (target, c)), "the first training batch", lambda: (source, target))

    @torch.no_grad()
    def _begin(
        self,
        pairs: Sequence[tuple[Weighted, Weighted]],
        where: str,
        all_samples: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        self._began = True
        (point, _), _ = pairs[0]
        for name in ("cost", "fitting_cost"):
            refuse_learned_cost(name, getattr(self, name), self._as_map_takes(point[:1].to(self.device)))
        start = getattr(self.map, "start", None)
        if not self._decisions["started"]:
            if callable(start):
                start(*(self._as_map_takes(part.flatten(0, -2).to(self.device)) for part in all_samples()))
            self._decisions.decide("started", 1)
        self._decide_epsilons(pairs, where)

    def _is_decided(self) -> bool:
        return bool(self._decisions["started"]) and None not in map(
            self._decisions.decided, ("fitting_epsilon", "gap_epsilon")
        )

    def _decide_epsilons(self, pairs: Sequence[tuple[Weighted, Weighted]], where: str) -> None:
        # Once, so that the loss does not change under the optimizer's feet; in the checkpoint, so that a resumed run
        # goes on with the same.
        by_fit = self.objective.fitting_loss == "sinkhorn" or self.objective.reweight
        by_gap = callable(self.gap_weight) or self.gap_weight > 0
        kept = []
        if all(self._given.values()):
            return
        pairs = few_of(pairs, lambda samples: self._as_map_takes(samples.to(self.device)))
        for name, needed, share, cost, sets in (
            ("fitting_epsilon", by_fit, self.relative_fitting_epsilon, self.fitting_cost, [(y, y) for _, y in pairs]),
            ("gap_epsilon", by_gap, self.relative_gap_epsilon, self.cost, pairs),
        ):
            before = self._decisions.decided(name)
            if self._given[name] or (before is not None and where == "the first training batch"):
                continue
            try:
                value = from_rank_zero(self.trainer, share_of_typical_cost(share, cost, sets))
            except ValueError as error:
                if needed and before is None:
                    raise ValueError(f"{name} cannot be decided from {where}: {error}, {name}=...") from error
                continue
            if before is None:
                self._decisions.decide(name, value)
            elif not 0.9 < before / value < 1.1:
                kept.append(f"{name}={before:.3g}, which would be {value:.3g} by these samples")
        if kept:
            rank_zero_warn(
                f"MongeMap goes on from an earlier fit on other samples, with its start and {', and '.join(kept)}: "
                "make a new MongeMap for other samples, or give the epsilons"
            )


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


def _reference(samples: Any) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Return the samples, and the names of their features where they have names."""
    if samples is None:
        return None, None
    if isinstance(samples, Mapping):  # of a checkpoint, whose state holds the samples
        return torch.zeros(samples["shape"]), None
    table = open_table("gap_reference", samples)
    return table.samples(None), table.features


def _feature_names(names: Sequence[str] | None, dim: int | None) -> list[str] | None:
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError(f"feature_names must be a list of names, got {names!r}: write [{names!r}]")
    found = [str(name) for name in names]
    if dim is not None and len(found) != dim:
        raise ValueError(f"feature_names has {len(found)} names for dim={dim}: give one for each feature")
    return found


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
    return torch.tensor(float("nan") if epsilon is None else epsilon)


def _resolve(name: str, cost: CostLike) -> Cost:
    try:
        return resolve(cost)
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}. A checkpoint holds only the name of a cost of your own: give it again, "
            f"as in MongeMap.load_from_checkpoint(path, {name}=...)"
        ) from error
