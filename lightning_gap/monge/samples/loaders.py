"""A LightningDataModule over samples that are prepared: its loaders, and what it tells a map."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_gap.checks import check_integer
from lightning_gap.monge.samples.batches import (
    HeldOutBatches,
    NumberedLoader,
    UnpairedBatch,
    UnpairedBatches,
    batch_loader,
    fitting_batch_size,
    own_randomness,
)
from lightning_gap.monge.samples.condition_encoding import ConditionEncoding
from lightning_gap.monge.samples.draws import Part
from lightning_gap.monge.samples.features import feature_places
from lightning_gap.monge.samples.prepare import Prepared, Split
from lightning_gap.monge.samples.rearrangement import with_encoding, with_features
from lightning_gap.monge.samples.standardize import AffineRepresentation
from lightning_gap.trainer.strategy import data_parallel_rank, data_parallel_size

__all__ = ["PreparedDataModule"]


class PreparedDataModule(LightningDataModule):
    """The loaders over prepared samples, which a derived class makes."""

    _prepared: Prepared
    _as_read: Prepared  # before features were chosen
    _default_batch: bool
    batch_size: int
    eval_batch_size: int
    steps_per_epoch: int | None
    conditions_per_batch: int | None
    seed: int
    num_workers: int

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
    def condition_encoding(self) -> ConditionEncoding | None:
        """How values of named columns become vectors; ``None`` where conditions are labels, or vectors as given."""
        return self._prepared.encoding

    @property
    def trained_combinations(self) -> list[tuple[str, ...]]:
        """Texts of the columns of the conditions that are trained on; empty without columns."""
        return self._prepared.trained_combinations

    def match_conditions(self, encoding: ConditionEncoding) -> None:
        """Give the vectors of an encoding from now on: :class:`MongeMap` asks for that of its training.

        Args:
            encoding: Of the same columns.

        Raises:
            ValueError: The columns are others, or it does not know one of the categories.
        """
        self._prepared = with_encoding(self._prepared, encoding)
        self._as_read = with_encoding(self._as_read, encoding)

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

    @property
    def training_sizes(self) -> list[int]:
        """Numbers of training samples of the sides and conditions that are finite."""
        return self._prepared.sizes

    def _replicas(self) -> tuple[int, int]:
        return (data_parallel_size(self.trainer), data_parallel_rank(self.trainer)) if self.trainer else (1, 0)

    def _held_out(self, stage: str) -> DataLoader[UnpairedBatch] | list[DataLoader[UnpairedBatch]]:
        held_out = self._prepared.held_out.get(stage)
        if held_out is None:
            if self.trainer and self.trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING):
                raise MisconfigurationException(
                    f"{stage}_fraction=0 holds no samples out: give SamplesDataModule({stage}_fraction=0.1), "
                    f"{stage}_groups, {stage}_conditions or {stage}"
                )
            return []
        most = max(len(x) for pair in held_out.pairs for x in pair)
        if most > self.eval_batch_size:
            rank_zero_info(f"{stage}: {self.eval_batch_size} of up to {most} held-out samples are compared at once")
        replicas, rank = self._replicas()
        return batch_loader(HeldOutBatches(held_out, self.eval_batch_size, num_replicas=replicas, rank=rank))
