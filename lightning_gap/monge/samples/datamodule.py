"""Unpaired samples of two populations, as a LightningDataModule."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from numpy.typing import ArrayLike
from torch import Tensor

from lightning_gap.checks import check_choice, check_integer
from lightning_gap.monge.samples.batches import UnpairedBatch
from lightning_gap.monge.samples.combinations import key_or_labels, left_out
from lightning_gap.monge.samples.files.table import Reading
from lightning_gap.monge.samples.given import KnownMap, Samples
from lightning_gap.monge.samples.loaders import PreparedDataModule
from lightning_gap.monge.samples.prepare import Split, prepare
from lightning_gap.monge.samples.splits import Request, read_stages

__all__ = ["SamplesDataModule", "Split", "UnpairedBatch"]

Table: TypeAlias = str | Path | Mapping[str, float | Sequence[float]] | Any

_BATCH_SIZE = 256


class SamplesDataModule(PreparedDataModule):
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
        val_conditions: Conditions that are held out whole for validation, which a map with vectors can be asked for:
            their names, values of a text column (``"drugA"`` means all its doses), or mappings such as
            ``{"drug": "A", "dose": 10}``. Of a side that serves other conditions too, as controls do,
            ``val_fraction`` is held out with them, by default 0.1.
        test_conditions: Conditions that are held out whole for the test, likewise.
        val: Samples to validate on: a pair ``(source, target)``, or a mapping with ``source``, ``target`` and any of
            ``weights``, ``conditions`` and ``true_images``, each as for training.
        test: Samples to test on, likewise.
        weights: Weights of the rows, of any positive sum: the name of a column of both sides, or a pair of names,
            arrays, ``.npy`` files or ``None``, of the source and of the target. Rows of weight 0 are left out.
        conditions: Labels of the rows, such as cell types or drugs, likewise. A side without labels serves every
            condition, as controls do. Labels of a side may be several: ``{"drug": labels, "dose": labels}``.
        condition_key: Columns of both sides whose combinations are the conditions, such as ``["drug", "dose"]``;
            batches then hold the vectors of a :class:`ConditionEncoding`, and the map takes names and numbers. Texts
            are categories and numbers numbers; ``{"patient": "category", "dose": "log"}`` says so by hand
            (``"number"``, too). A column that the source lacks, or that has no value of the target's there, as of
            controls, is told of the target alone. A single name is that of ``conditions``.
        groups: Labels of the rows, such as patients, likewise, for ``val_groups`` and ``test_groups``.
        true_images: Images of the source's rows under a known map: an array, a path, or a function of the samples.
        condition_vectors: Vectors of the conditions, such as doses or embeddings: ``{name: vector}``, a data frame
            with the names as its index, or a path to a table with the names in the first column. Batches then hold
            vectors instead of labels, and conditions may be held out whole.
        condition_embeddings: Vectors of categories, such as molecules' fingerprints, in place of one-hot ones, by which
            a map can be asked for one that it was not trained on: a table as for ``condition_vectors``, of further
            names too, or ``{column: table}``.
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
        val_conditions: Sequence[Any] | None = None,
        test_conditions: Sequence[Any] | None = None,
        val: Mapping[str, Any] | Sequence[Any] | None = None,
        test: Mapping[str, Any] | Sequence[Any] | None = None,
        weights: str | Sequence[Any] | None = None,
        conditions: str | Sequence[Any] | None = None,
        condition_key: str | Sequence[str] | Mapping[str, str | None] | None = None,
        groups: str | Sequence[Any] | None = None,
        true_images: KnownMap | str | Path | ArrayLike | Tensor | None = None,
        condition_vectors: Table | None = None,
        condition_embeddings: Table | None = None,
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
        for name, option in (
            ("condition_vectors", condition_vectors),
            ("condition_embeddings", condition_embeddings),
            ("conditions_per_batch", conditions_per_batch),
        ):
            if option is not None and conditions is None and condition_key is None:
                raise ValueError(f"{name} is for conditions: give conditions=, the labels of the rows")
        labels, kinds, column = key_or_labels(conditions, condition_key, condition_vectors, condition_embeddings)
        self._default_batch = batch_size is None
        self.eval_batch_size = eval_batch_size
        self.steps_per_epoch = steps_per_epoch
        self.conditions_per_batch = conditions_per_batch
        self.small_conditions = small_conditions
        self.seed = seed
        self.num_workers = num_workers

        given, explicit, rule = read_stages(
            source, target, Reading(columns, layer, obsm),
            fractions=(val_fraction, test_fraction), held_groups=(val_groups, test_groups),
            held_conditions=(val_conditions, test_conditions), explicit=(val, test), seed=seed,
            rows=(source_rows, target_rows), weights=weights, conditions=labels, condition_key=list(kinds),
            condition_column=column, groups=groups, true_images=true_images,
        )  # fmt: skip
        request = Request(
            rule=rule,
            batch_size=_BATCH_SIZE if batch_size is None else batch_size,
            default_batch=self._default_batch,
            small_conditions=small_conditions,
            condition_vectors=condition_vectors,
            condition_embeddings=condition_embeddings,
            condition_kinds=kinds,
            conditions_per_batch=conditions_per_batch,
            standardize=standardize,
            components=components,
            eval_batch_size=eval_batch_size,
        )
        self._prepared = self._as_read = prepare(given, explicit, request)
        self._inputs = (given, explicit, request) if self._prepared.names else None
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
        condition_key: str | Sequence[str] | Mapping[str, str | None] | None = None,
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
            condition_key: Column of ``obs`` with conditions, such as cell types, or columns, such as drug and dose.
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
            condition_key=condition_key,
            groups=group_key,
            weights=weights_key,
            **options,
        )

    def leave_one_condition_out(self, by: str | None = None) -> Iterator[tuple[str, "SamplesDataModule"]]:
        """Yield for each condition its name, and these samples with it held out whole for the test.

        Nothing is read again. What was held out for the test before is trained on.

        Args:
            by: Column of ``condition_key`` of which a value is left out at a time, as a drug with all its doses; by
                default one condition.

        Raises:
            ValueError: There are no conditions, or no such column, or conditions are labels without vectors.

        Example:
            >>> import torch
            >>> labels = {"drug": ["A", "A", "B", "B"] * 50, "dose": [1, 10, 1, 10] * 50}
            >>> x, y = torch.randn(90, 2), torch.randn(200, 2)
            >>> data = SamplesDataModule(x, y, batch_size=16, conditions=(None, labels))
            >>> for name, fold in data.leave_one_condition_out("drug"):
            ...     print(name, fold.condition_names, len(fold.test_dataloader()))
            A ('A, 1', 'A, 10', 'B, 1', 'B, 10') 2
            B ('A, 1', 'A, 10', 'B, 1', 'B, 10') 2
        """
        if self._inputs is None:
            raise ValueError("there are no conditions to leave out: give conditions= or condition_key=")
        given, explicit, request = self._inputs
        explicit = {stage: sides for stage, sides in explicit.items() if stage != "test"}
        for title, names in left_out(self._as_read.names, self._as_read.combinations, by).items():
            fold = copy(self)
            fold.trainer = None
            fold._prepared = fold._as_read = prepare(
                given, explicit, replace(request, rule=request.rule.testing(names))
            )
            fold.batch_size = fold._prepared.batch_size
            yield title, fold
