"""Unpaired samples of two populations, as a LightningDataModule."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_gap.checks import check_choice, check_integer
from lightning_gap.monge.samples.batches import (
    HeldOutBatches,
    NumberedLoader,
    UnpairedBatch,
    UnpairedBatches,
    batch_loader,
    fitting_batch_size,
    own_randomness,
)
from lightning_gap.monge.samples.draws import Part
from lightning_gap.monge.samples.features import feature_places
from lightning_gap.monge.samples.files.table import Reading
from lightning_gap.monge.samples.given import KnownMap, Samples
from lightning_gap.monge.samples.prepare import Split, prepare
from lightning_gap.monge.samples.rearrangement import with_features
from lightning_gap.monge.samples.splits import Request, read_stages
from lightning_gap.monge.samples.standardize import AffineRepresentation
from lightning_gap.trainer.strategy import data_parallel_rank, data_parallel_size

__all__ = ["SamplesDataModule", "Split", "UnpairedBatch"]

Table: TypeAlias = str | Path | Mapping[str, float | Sequence[float]] | Any

_BATCH_SIZE = 256


class SamplesDataModule(LightningDataModule):
    r"""Two sets of unpaired samples, split and batched for :class:`~lightning_gap.MongeMap`.

    Batches are :class:`UnpairedBatch`. In training a batch has ``batch_size`` random samples of each side, drawn
    independently; an epoch goes through the larger set once, but for a last incomplete batch. With conditions a batch
    has ``batch_size`` samples of each side for every condition, ``(K, batch_size, d)``. Validation and test see what
    is held out as one batch, or one a condition; prediction gets all raw source samples in their order, but for
    those of conditions that ``small_conditions="drop"`` leaves out.

    Rows of each batch follow from seed, epoch and number alone: a run that resumes within an epoch sees what the
    uninterrupted one would have seen, and several processes share the batch that one would see at the same global
    batch size.

    Args:
        source: The samples to be mapped. An ``(n, d)`` array, tensor, data frame or ``AnnData``; a path to an
            ``.npy``, ``.npz``, ``.csv``, ``.tsv``, ``.parquet``, ``.feather`` or ``.h5ad`` file, where
            ``"file.npz::name"`` names an array within; a sampler, ``(n, generator) -> (n, d)``; or something that
            yields samples endlessly, such as an ``IterableDataset``. Float64 in either set makes both float64, other
            numbers become float32.
        target: The samples to be mapped to, likewise.
        batch_size: Samples of each side in a training batch, and of each condition, on each device. By default 256, or
            all of the smallest set that is trained on, which is said.
        val_fraction: Share of the rows that is held out for validation, in [0, 1), in each condition at least one row.
            By default 0.1, and 0 where ``val_groups`` or ``val`` is given.
        test_fraction: Share of the rows that is held out for the test, likewise.
        val_groups: Groups that are held out whole for validation: their names, or the share of all groups.
        test_groups: Groups that are held out whole for the test, likewise.
        val: Samples to validate on: a pair ``(source, target)``, or a mapping with ``source``, ``target`` and any of
            ``weights``, ``conditions`` and ``true_images``, each as for training.
        test: Samples to test on, likewise.
        weights: Weights of the rows, of any positive sum: the name of a column of both sides, or a pair of names,
            arrays, ``.npy`` files or ``None``, of the source and of the target. Rows of weight 0 are left out.
        conditions: Labels of the rows, such as cell types or drugs, likewise. A side without labels serves every
            condition, as controls do.
        groups: Labels of the rows, such as patients, likewise, for ``val_groups`` and ``test_groups``.
        true_images: Images of the source's rows under a known map: an array, a path, or a function of the samples.
        condition_vectors: Vectors of the conditions, such as doses or embeddings: ``{name: vector}``, a data frame
            with the names as its index, or a path to a table with the names in the first column. Batches then hold
            vectors instead of labels, and conditions may be held out whole.
        conditions_per_batch: How many conditions a training batch has, chosen at random; all by default.
        small_conditions: What becomes of a condition with fewer training samples than a batch needs: ``"refuse"`` it,
            ``"drop"`` it, or ``"shrink"`` the batch.
        standardize: Whether to divide each feature by its standard deviation, over source and target together.
        components: Number of principal components to learn in; all features by default.
        columns: Names of the features: columns of a table, genes of ``AnnData``.
        layer: Layer of ``AnnData``; ``X`` by default.
        obsm: Embedding of ``AnnData`` in place of a layer, as in ``obsm="X_pca"``.
        source_rows: Which rows of a table are the source, ``{column: value or list of values}``.
        target_rows: Which rows of a table are the target, likewise.
        steps_per_epoch: Batches in an epoch; by default one pass through the larger set, and 100 where both sides are
            endless.
        eval_batch_size: Largest number of held-out samples of each side that are compared at once, and the number
            that is held out of a sampler or a stream.
        seed: Seed of the split and of the shuffles.
        num_workers: Workers of the training loader.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: A library for such files is missing; ``pip install 'lightning_gap[files]'`` brings it.
        TypeError: An argument is of the wrong kind.
        ValueError: Shapes do not fit, values are not finite, names do not exist, nothing is left to train on, or
            ``batch_size`` is larger than the training split.
        MisconfigurationException: ``trainer.validate`` or ``trainer.test`` is called with nothing held out.

    Example:
        >>> import torch
        >>> data = SamplesDataModule(torch.randn(100, 2), torch.randn(80, 2), batch_size=32)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.source.shape, batch.target.shape
        (torch.Size([32, 2]), torch.Size([32, 2]))
        >>> cell_types = ["B", "T"] * 50
        >>> data = SamplesDataModule(torch.randn(100, 2), torch.randn(100, 2), batch_size=32,
        ...                          conditions=(cell_types, cell_types), standardize=True)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.source.shape, batch.condition, data.condition_names
        (torch.Size([2, 32, 2]), tensor([0, 1]), ('B', 'T'))
    """

    def __init__(
        self,
        source: Samples,
        target: Samples,
        *,
        batch_size: int | None = None,
        val_fraction: float | None = None,
        test_fraction: float = 0.0,
        val_groups: Sequence[str | int] | float | None = None,
        test_groups: Sequence[str | int] | float | None = None,
        val: Mapping[str, Any] | Sequence[Any] | None = None,
        test: Mapping[str, Any] | Sequence[Any] | None = None,
        weights: str | Sequence[Any] | None = None,
        conditions: str | Sequence[Any] | None = None,
        groups: str | Sequence[Any] | None = None,
        true_images: KnownMap | str | Path | ArrayLike | Tensor | None = None,
        condition_vectors: Table | None = None,
        conditions_per_batch: int | None = None,
        small_conditions: Literal["refuse", "drop", "shrink"] = "refuse",
        standardize: bool = False,
        components: int | None = None,
        columns: Sequence[str] | None = None,
        layer: str | None = None,
        obsm: str | None = None,
        source_rows: Mapping[str, Any] | None = None,
        target_rows: Mapping[str, Any] | None = None,
        steps_per_epoch: int | None = None,
        eval_batch_size: int = 2048,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("eval_batch_size", eval_batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
            ("batch_size", batch_size, 1),
            ("conditions_per_batch", conditions_per_batch, 1),
            ("steps_per_epoch", steps_per_epoch, 1),
            ("components", components, 1),
        ):
            if value is not None or name in ("eval_batch_size", "seed", "num_workers"):
                check_integer(name, value, least)
        check_choice("small_conditions", small_conditions, ("refuse", "drop", "shrink"))
        if conditions is None and (condition_vectors is not None or conditions_per_batch is not None):
            name = "conditions_per_batch" if condition_vectors is None else "condition_vectors"
            raise ValueError(f"{name} is for conditions: give conditions=, the labels of the rows")
        self._default_batch = batch_size is None
        self.eval_batch_size = eval_batch_size
        self.steps_per_epoch = steps_per_epoch
        self.conditions_per_batch = conditions_per_batch
        self.small_conditions = small_conditions
        self.seed = seed
        self.num_workers = num_workers

        given, explicit, rule = read_stages(
            source, target, Reading(columns, layer, obsm),
            fractions=(val_fraction, test_fraction), held_groups=(val_groups, test_groups), explicit=(val, test),
            seed=seed, rows=(source_rows, target_rows), weights=weights, conditions=conditions, groups=groups,
            true_images=true_images,
        )  # fmt: skip
        request = Request(
            rule=rule,
            batch_size=_BATCH_SIZE if batch_size is None else batch_size,
            default_batch=self._default_batch,
            small_conditions=small_conditions,
            condition_vectors=condition_vectors,
            conditions_per_batch=conditions_per_batch,
            standardize=standardize,
            components=components,
            eval_batch_size=eval_batch_size,
        )
        self._prepared = self._as_read = prepare(given, explicit, request)
        self.batch_size = self._prepared.batch_size

    @classmethod
    def from_anndata(
        cls,
        data: Any,
        *,
        key: str,
        source: Any,
        target: Any,
        layer: str | None = None,
        obsm: str | None = None,
        condition_key: str | None = None,
        group_key: str | None = None,
        weights_key: str | None = None,
        **options: Any,
    ) -> "SamplesDataModule":
        """Return the data module of one ``AnnData`` that holds both populations.

        Args:
            data: ``AnnData``, or the path to an ``.h5ad`` file.
            key: Column of ``obs`` that tells the populations apart, such as ``"treated"``.
            source: Its value, or list of values, for the cells to be mapped.
            target: Its value, or list of values, for the cells to be mapped to.
            layer: Layer of ``AnnData``; ``X`` by default.
            obsm: Embedding in place of a layer.
            condition_key: Column of ``obs`` with conditions, such as cell types.
            group_key: Column of ``obs`` with groups, such as patients.
            weights_key: Column of ``obs`` with weights.
            **options: Any other argument of :class:`SamplesDataModule`.

        Example:
            >>> data = SamplesDataModule.from_anndata(  # doctest: +SKIP
            ...     "kang.h5ad", key="treated", source="control", target="stim", obsm="X_pca",
            ...     condition_key="cell_type", group_key="patient", test_groups=["107"],
            ... )
        """
        return cls(
            data,
            data,
            source_rows={key: source},
            target_rows={key: target},
            layer=layer,
            obsm=obsm,
            conditions=condition_key,
            groups=group_key,
            weights=weights_key,
            **options,
        )

    @property
    def dim(self) -> int:
        """Dimension of the batches: of the samples as they are encoded."""
        return self._prepared.dim

    @property
    def representation(self) -> AffineRepresentation | None:
        """Coordinates of the batches, fitted on the training rows; ``None`` where these are the raw ones."""
        return self._prepared.representation

    @property
    def feature_names(self) -> tuple[str, ...] | None:
        """Names of the raw features, where the data name them."""
        return self._prepared.features

    def match_features(self, names: Sequence[str]) -> None:
        """Give the features of these names, in their order, from now on: :class:`MongeMap` asks for its own.

        Args:
            names: Names of features; others that the data have are ignored with a warning.

        Raises:
            ValueError: The data have no such feature, or principal components of others.
        """
        if self._as_read.features is None:
            return
        places = feature_places(
            "the data module", self._as_read.features, names, "the map", remedy="give the map data with these features"
        )
        self._prepared = self._as_read if places is None else with_features(self._as_read, places)

    @property
    def condition_names(self) -> tuple[str, ...]:
        """Names of the conditions; label ``k`` means the ``k``-th. Empty without conditions."""
        return self._prepared.names

    @property
    def condition_vectors(self) -> Tensor | None:
        """``(K, p)`` vectors of the named conditions; ``None`` where conditions are labels."""
        return self._prepared.vectors

    @property
    def source(self) -> Tensor:
        """The raw source, ``(n, d)``; of a sampler or a stream, the samples that prediction maps."""
        return self._prepared.predicted.samples

    @property
    def splits(self) -> dict[str, Split]:
        """Encoded samples of ``"train"`` and of what is held out as ``"val"`` and ``"test"``, of all conditions."""
        return self._prepared.splits(self.seed, self.eval_batch_size)

    def training_samples(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Return encoded training samples, ``(n, d)`` of the source and ``(m, d)`` of the target, in random order.

        Those of all conditions are together; a sampler or stream gives as many as an evaluation takes.

        Args:
            most: Largest number of each side; all of a finite set by default.
        """
        if most is not None:
            check_integer("most", most)
        size = self.eval_batch_size if most is None else most
        return self._prepared.training_samples(self.seed, size, most)

    @property
    def endless(self) -> bool:
        """Whether a side is drawn anew for each batch: a sampler or a stream."""
        return self._prepared.endless

    @property
    def trained_vectors(self) -> Tensor | None:
        """``(K, p)`` vectors of the conditions that are trained on; ``None`` where conditions are labels."""
        return None if self.condition_vectors is None else self._prepared.conditions

    @property
    def trained_conditions(self) -> Tensor | None:
        """Labels ``(K,)`` or vectors ``(K, p)`` of the conditions that are trained on; ``None`` without conditions."""
        return self._prepared.conditions

    def training_pairs(self, most: int | None = None) -> list[tuple[Part, Part]]:
        """Return the encoded training samples of source and target, with weights, of each condition in turn.

        A sampler or stream gives ``most``, by default as many as an evaluation takes.
        """
        return self._prepared.training_pairs(self.seed, most or self.eval_batch_size)

    @override
    def train_dataloader(self) -> DataLoader[UnpairedBatch]:
        """Return the loader of random unpaired batches."""
        replicas, rank = self._replicas()
        prepared, sizes = self._prepared, self._prepared.sizes
        if sizes:
            self.batch_size = fitting_batch_size(self.batch_size, min(sizes), replicas, default=self._default_batch)
        size = self.batch_size * replicas
        batches = UnpairedBatches(
            prepared.train,
            size,
            self.steps_per_epoch or prepared.steps(size, self.conditions_per_batch),
            conditions=prepared.conditions,
            per_batch=self.conditions_per_batch,
            seed=self.seed,
            num_replicas=replicas,
            rank=rank,
        )
        return batch_loader(batches, self.trainer, self.num_workers)

    @override
    def val_dataloader(self) -> DataLoader[UnpairedBatch] | list[DataLoader[UnpairedBatch]]:
        """Return the samples held out for validation; none in a fit where nothing is."""
        return self._held_out("val")

    @override
    def test_dataloader(self) -> DataLoader[UnpairedBatch] | list[DataLoader[UnpairedBatch]]:
        """Return the samples held out for the test."""
        return self._held_out("test")

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the raw source samples in their order, with conditions as pairs ``(samples, condition)``.

        A source without labels comes once under every condition, in the order of :attr:`condition_names`.
        """
        return NumberedLoader(self._prepared.predicted, batch_size=self.eval_batch_size, generator=own_randomness())

    def _replicas(self) -> tuple[int, int]:
        return (data_parallel_size(self.trainer), data_parallel_rank(self.trainer)) if self.trainer else (1, 0)

    def _held_out(self, stage: str) -> DataLoader[UnpairedBatch] | list[DataLoader[UnpairedBatch]]:
        held_out = self._prepared.held_out.get(stage)
        if held_out is None:
            if self.trainer and self.trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
                raise MisconfigurationException(
                    f"{stage}_fraction=0 holds no samples out: give SamplesDataModule({stage}_fraction=0.1), "
                    f"{stage}_groups or {stage}"
                )
            return []
        most = max(len(x) for pair in held_out.pairs for x in pair)
        if most > self.eval_batch_size:
            rank_zero_info(f"{stage}: {self.eval_batch_size} of up to {most} held-out samples are compared at once")
        replicas, rank = self._replicas()
        return batch_loader(HeldOutBatches(held_out, self.eval_batch_size, num_replicas=replicas, rank=rank))
