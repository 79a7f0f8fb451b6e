"""Unpaired samples of two populations, as a LightningDataModule."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_gap.checks import check_count
from lightning_gap.monge.samples.batches import (
    HeldOutBatches,
    NumberedLoader,
    UnpairedBatch,
    UnpairedBatches,
    held_out_loader,
    own_randomness,
    training_loader,
)
from lightning_gap.monge.samples.draws import FiniteSamples, Part, Population, SampledSamples, StreamedSamples, Turn
from lightning_gap.monge.samples.features import feature_places
from lightning_gap.monge.samples.files.table import Reading
from lightning_gap.monge.samples.given import Side, is_stream, read_sides
from lightning_gap.monge.samples.prepare import Endless, Request, prepare
from lightning_gap.monge.samples.rearrangement import with_features
from lightning_gap.monge.samples.splits import SplitRule, generator, named_groups
from lightning_gap.monge.samples.standardize import AffineRepresentation
from lightning_gap.trainer.strategy import data_parallel_rank, data_parallel_size

__all__ = ["SamplesDataModule", "Split", "UnpairedBatch"]


class Sampler(Protocol):
    """Draws samples."""

    def __call__(self, n: int, generator: torch.Generator, /) -> Any:
        """Return ``(n, d)`` samples."""


class KnownMap(Protocol):
    """Maps samples."""

    def __call__(self, samples: Tensor, /) -> Any:
        """Return their images."""


# Functions before text: a configuration file names them by their import path. As protocols, since a plain callable
# would claim all text when a configuration is written.
Samples: TypeAlias = Sampler | str | Path | ArrayLike | Tensor | Iterable[Any]
Table: TypeAlias = str | Path | Mapping[str, float | Sequence[float]] | Any

_BATCH_SIZE = 256
_ENDLESS_STEPS = 100
_START = 20  # first entry of the key of random draws
_OPTIONAL = ("batch_size", "conditions_per_batch", "steps_per_epoch", "components")


class Split(NamedTuple):
    """Samples of a stage: ``(n, d)`` of the source, ``(m, d)`` of the target."""

    source: Tensor
    target: Tensor


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
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("seed", seed, 0),
            ("num_workers", num_workers, 0),
            ("conditions_per_batch", conditions_per_batch, 1),
            ("steps_per_epoch", steps_per_epoch, 1),
            ("components", components, 1),
        ):
            if value is not None or name not in _OPTIONAL:
                check_count(name, value, least)
        if small_conditions not in ("refuse", "drop", "shrink"):
            raise ValueError(f"small_conditions must be 'refuse', 'drop' or 'shrink', got {small_conditions!r}")
        if conditions is None:
            for name, given in (
                ("condition_vectors", condition_vectors),
                ("conditions_per_batch", conditions_per_batch),
            ):
                if given is not None:
                    raise ValueError(f"{name} is for conditions: give conditions=, the labels of the rows")
        fractions = _fractions(val_fraction, test_fraction, val_groups, test_groups, val, test)
        self._default_batch = batch_size is None
        batch_size = _BATCH_SIZE if batch_size is None else batch_size
        self.eval_batch_size = eval_batch_size
        self.steps_per_epoch = steps_per_epoch
        self.conditions_per_batch = conditions_per_batch
        self.small_conditions = small_conditions
        self.seed = seed
        self.num_workers = num_workers

        reading = Reading(columns, layer, obsm)
        sides = read_sides(
            source, target, reading, rows=(source_rows, target_rows), weights=weights, conditions=conditions,
            groups=groups, true_images=true_images,
        )  # fmt: skip
        given = (
            sides[0] if sides[0] is not None else _endless("source", source, true_images),
            sides[1] if sides[1] is not None else _endless("target", target, None),
        )
        explicit = {
            stage: _read_explicit(stage, samples, reading, sides)
            for stage, samples in (("val", val), ("test", test))
            if samples is not None
        }
        prepared = prepare(
            given,
            explicit,
            Request(
                rule=_split_rule(sides, fractions, val_groups, test_groups, seed),
                batch_size=batch_size,
                default_batch=self._default_batch,
                small_conditions=small_conditions,
                condition_vectors=condition_vectors,
                standardize=standardize,
                components=components,
                eval_batch_size=eval_batch_size,
            ),
        )
        if conditions_per_batch is not None and conditions_per_batch > len(prepared.train):
            raise ValueError(
                f"conditions_per_batch={conditions_per_batch} is more than the {len(prepared.train)} conditions that "
                f"are trained on: use conditions_per_batch <= {len(prepared.train)}"
            )
        self.batch_size = prepared.batch_size
        self._prepared = self._as_read = prepared

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
        parts = {"train": Split(*self.training_samples())}
        for stage, held_out in self._prepared.held_out.items():
            # A side without labels is in the pair of every condition.
            sides = ({id(pair[i]): pair[i].samples for pair in held_out.pairs} for i in range(2))
            parts[stage] = Split(*(torch.cat(list(samples.values())) for samples in sides))
        return parts

    def training_samples(self, most: int | None = None) -> tuple[Tensor, Tensor]:
        """Return encoded training samples, ``(n, d)`` of the source and ``(m, d)`` of the target, in random order.

        Those of all conditions are together; a sampler or stream gives as many as an evaluation takes.

        Args:
            most: Largest number of each side; all of a finite set by default.
        """
        if most is not None:
            check_count("most", most)
        most_endless = self.eval_batch_size if most is None else most
        sides = []
        for i in range(2):
            # A side without labels is in the pair of every condition.
            distinct = {id(pair[i]): pair[i] for pair in self._prepared.train}
            samples = torch.cat([
                x.samples if isinstance(x, FiniteSamples) else x.draw(
                    Turn((self.seed, _START, i), 0, 0, 1, most_endless, slice(None))
                ).samples
                for x in distinct.values()
            ])  # fmt: skip
            order = torch.randperm(len(samples), generator=generator(self.seed, _START, i), device="cpu")[:most]
            sides.append(samples[order.to(samples.device)])
        return sides[0], sides[1]

    @property
    def endless(self) -> bool:
        """Whether a side is drawn anew for each batch: a sampler or a stream."""
        return not all(isinstance(x, FiniteSamples) for pair in self._prepared.train for x in pair)

    @property
    def trained_vectors(self) -> Tensor | None:
        """``(K, p)`` vectors of the conditions that are trained on; ``None`` where conditions are labels."""
        return None if self.condition_vectors is None else self._conditions(self._prepared.codes)

    def training_pairs(self) -> list[tuple[Part, Part]]:
        """Return the encoded training samples of source and target, with weights, of each condition in turn.

        A sampler or stream gives as many as an evaluation takes.
        """

        def part(population: Population, side: int) -> Part:
            if isinstance(population, FiniteSamples):
                return Part(population.samples, population.weights)
            return population.draw(Turn((self.seed, _START, side), 0, 0, 1, self.eval_batch_size, slice(None)))

        return [(part(source, 0), part(target, 1)) for source, target in self._prepared.train]

    def train_dataloader(self) -> DataLoader[UnpairedBatch]:
        """Return the loader of random unpaired batches."""
        replicas, rank = self._replicas()
        prepared = self._prepared
        sizes = [len(x) for pair in prepared.train for x in pair if isinstance(x, FiniteSamples)]
        smallest = min(sizes, default=self.batch_size * replicas)
        if self._default_batch and self.batch_size * replicas > smallest >= replicas:
            self.batch_size = smallest // replicas
            rank_zero_warn(f"the default batch_size shrinks to {self.batch_size} on each of {replicas} devices")
        if self.batch_size * replicas > smallest:
            what = (
                f"{replicas} devices needs {self.batch_size * replicas}" if replicas > 1 else "a device needs as many"
            )
            raise ValueError(
                f"batch_size={self.batch_size} on {what} samples of each set, the training split has {smallest}: "
                f"use batch_size <= {smallest // replicas}"
            )
        size = self.batch_size * replicas
        batches = UnpairedBatches(
            prepared.train,
            size,
            self._steps(max(sizes, default=0), size),
            conditions=self._conditions(prepared.codes),
            per_batch=self.conditions_per_batch,
            seed=self.seed,
            num_replicas=replicas,
            rank=rank,
        )
        return training_loader(batches, self.trainer, self.num_workers)

    def val_dataloader(self) -> DataLoader[UnpairedBatch] | list[DataLoader[UnpairedBatch]]:
        """Return the samples held out for validation; none in a fit where nothing is."""
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader[UnpairedBatch] | list[DataLoader[UnpairedBatch]]:
        """Return the samples held out for the test."""
        return self._held_out("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the raw source samples in their order, with conditions as pairs ``(samples, condition)``.

        A source without labels comes once under every condition, in the order of :attr:`condition_names`.
        """
        predicted = self._prepared.predicted
        conditions = None if predicted.codes is None else self._conditions(predicted.codes)
        samples = _Predicted(predicted.samples, predicted.rows, conditions)
        return NumberedLoader(samples, batch_size=self.eval_batch_size, generator=own_randomness())

    def _replicas(self) -> tuple[int, int]:
        return (data_parallel_size(self.trainer), data_parallel_rank(self.trainer)) if self.trainer else (1, 0)

    def _steps(self, largest: int, size: int) -> int:
        if self.steps_per_epoch is not None:
            return self.steps_per_epoch
        if not largest:
            return _ENDLESS_STEPS
        conditions = len(self._prepared.train)
        return max(1, largest // size * conditions // (self.conditions_per_batch or conditions))

    def _conditions(self, codes: Sequence[int] | Tensor) -> Tensor | None:
        """Return what batches hold of the conditions: labels, or vectors."""
        if not self._prepared.names:
            return None
        index = torch.as_tensor(codes, dtype=torch.long, device="cpu")
        return index if self._prepared.vectors is None else self._prepared.vectors[index]

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
        return held_out_loader(
            HeldOutBatches(
                held_out.pairs,
                held_out.again,
                self.eval_batch_size,
                conditions=self._conditions(held_out.codes),
                titles=held_out.titles,
                num_replicas=replicas,
                rank=rank,
            )
        )


class _Predicted(Dataset[Any]):
    def __init__(self, samples: Tensor, rows: Tensor, conditions: Tensor | None) -> None:
        self.samples = samples
        self.rows = rows
        self.conditions = conditions

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        sample = self.samples[self.rows[index]]
        return sample if self.conditions is None else (sample, self.conditions[index])


def _endless(argument: str, data: Any, true_images: Any) -> Endless:
    true_map = true_images if argument == "source" else None
    return SampledSamples(argument, data, true_map) if callable(data) else StreamedSamples(argument, data, 0, true_map)


def _fractions(
    val_fraction: float | None,
    test_fraction: float,
    val_groups: Any,
    test_groups: Any,
    val: Any,
    test: Any,
) -> tuple[float, float]:
    """Return the shares of the rows that are held out, checked."""
    found = []
    for stage, fraction, groups, explicit, default in (
        ("val", val_fraction, val_groups, val, 0.1),
        ("test", test_fraction, test_groups, test, 0.0),
    ):
        if fraction is None:
            fraction = default if groups is None and explicit is None else 0.0
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
            raise ValueError(f"{stage}_fraction must be in [0, 1), got {fraction!r}")
        given = [f"{stage}_fraction"] * bool(fraction)
        given += [name for name, x in ((f"{stage}_groups", groups), (stage, explicit)) if x is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say what is held out: give one of them")
        found.append(float(fraction))
    if sum(found) >= 1:
        raise ValueError(f"val_fraction + test_fraction = {sum(found)} leaves nothing to train on")
    return found[0], found[1]


def _split_rule(
    sides: Sequence[Side | None], fractions: tuple[float, float], val_groups: Any, test_groups: Any, seed: int
) -> SplitRule:
    labels = [side.groups for side in sides if side is not None]
    have = [x for x in labels if x is not None]
    if val_groups is None and test_groups is None:
        if have:
            raise ValueError("groups are for val_groups and test_groups: name the groups to hold out, or their share")
        return SplitRule(*fractions, seed=seed)
    if not have or len(have) < len(labels):
        raise ValueError("val_groups and test_groups need the groups of both sides: give groups=, their labels")
    available = sorted({str(name) for names in have for name in np.unique(names)})
    return SplitRule(*fractions, *named_groups(val_groups, test_groups, available, seed), seed=seed)


_EXPLICIT = ("source", "target", "weights", "conditions", "true_images")


def _read_explicit(stage: str, given: Any, reading: Reading, train: Sequence[Side | None]) -> tuple[Side, Side]:
    """Return the sides that were given for one stage."""
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2:
        given = dict(zip(("source", "target"), given, strict=True))
    if not isinstance(given, Mapping) or not {"source", "target"} <= set(given) <= set(_EXPLICIT):
        raise TypeError(
            f"{stage} must be a pair (source, target), or a mapping with these and any of "
            f"{', '.join(_EXPLICIT[2:])}, got {type(given).__name__}"
            + (f" with {', '.join(map(repr, given))}" if isinstance(given, Mapping) else "")
        )
    options = {name: value for name, value in given.items() if name not in ("source", "target")}
    for name in ("source", "target"):
        if is_stream(given[name]):
            raise TypeError(f"{stage}: {name} must be samples, got {type(given[name]).__name__}: draw them first")
    wanted = next((side for side in train if side is not None and side.features is not None), None)
    source, target = read_sides(given["source"], given["target"], reading, prefix=f"{stage} ", like=wanted, **options)
    assert source is not None
    assert target is not None
    for name, side, trained in zip(("source", "target"), (source, target), train, strict=True):
        labelled = trained is not None and trained.conditions is not None
        if labelled != (side.conditions is not None):
            raise ValueError(
                f"{stage}: the {name} {'needs' if labelled else 'takes no'} conditions, as in training: give "
                f"{stage}={{'source': ..., 'target': ..., 'conditions': (of the source, of the target)}}"
            )
    return source, target
