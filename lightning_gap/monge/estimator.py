"""MongeMap as a scikit-learn transformer."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import ArrayLike, NDArray
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_gap.monge.fits import plain_trainer
from lightning_gap.monge.module import MongeMap
from lightning_gap.monge.ot.costs import CostLike, resolve
from lightning_gap.monge.ot.divergence import sinkhorn_divergence
from lightning_gap.monge.ot.epsilon import FITTING_SHARE, Epsilon, Weighted
from lightning_gap.monge.ot.priority_sampling import few_of
from lightning_gap.monge.samples.datamodule import SamplesDataModule
from lightning_gap.monge.samples.features import columns_like, listed, names_of
from lightning_gap.trainer.terminal import quiet

try:
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler
    from sklearn.utils import ClassifierTags, check_array, check_consistent_length, check_random_state
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise ImportError(
        "MongeMapTransformer needs scikit-learn 1.6 or newer: pip install 'lightning_gap[sklearn]'"
    ) from error

__all__ = ["MongeMapTransformer"]

_DTYPES = [np.float64, np.float32]


class MongeMapTransformer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    r"""Learns a transport map from one sample to another, and moves new samples along it.

    .. math::
        \min_T \; S_{\varepsilon_1}(T\sharp\mu, \nu) + \lambda\, M^c_{\varepsilon_2}(T)

    (Uscidda and Cuturi 2023, "The Monge Gap", section 3.) There are two ways to give the samples of both measures,
    of any sizes; their rows are not paired.

    - ``fit(X, samples)``: ``X`` is the source, and ``y`` the ``(m, d)`` target. Of data frames the columns of ``y`` are
      put in the order of those of ``X``, by name; ``transform`` takes them in the order of ``fit``, as everywhere in
      scikit-learn.
    - ``fit(X, labels)``: ``X`` holds both, and ``y`` tells for each row which one it is of. Pipelines then treat both
      alike, and model selection splits them together (by ``StratifiedKFold`` or another splitter that shuffles).
      ``transform`` moves each row that it is given, also one of the target.

    It trains a :class:`~lightning_gap.MongeMap` by Adam with a cosine decay, and leaves no trace: no files, no output,
    and torch's, NumPy's and Python's global random numbers as they were (unless ``random_state`` is ``None``, which
    draws a seed from NumPy's, as everywhere in scikit-learn). Each ``fit`` starts anew.

    Args:
        cost: Ground cost :math:`c` of the Monge gap: a name, an instance from :mod:`lightning_gap.costs`, or a
            function.
        fitting_cost: Ground cost of the Sinkhorn divergence.
        gap_weight: Weight :math:`\lambda \ge 0` of the Monge gap; by default that of :class:`~lightning_gap.MongeMap`.
        hidden: Widths of the network's hidden layers, likewise.
        max_steps: Updates.
        batch_size: Samples of each set in a batch, or all of the smaller set where it has fewer.
        learning_rate: Adam's, at the start of a decay along a cosine; by default that of the map's default.
        fitting_epsilon: Regularization of the divergence, in units of its cost; by default 5 % of the typical cost
            within the target.
        gap_epsilon: Regularization of the gap, in units of ``cost``; by default 1 % of the typical cost between the
            sets.
        standardize: Whether the map is learned between features divided by their standard deviations in both samples
            together: costs and epsilons are then those of standardized features. Choose ``False`` for features in
            common units, and for points of the sphere.
        n_components: Learn the map between so many principal components of both samples together; images lie in their
            span then. All features by default.
        accelerator: Lightning's accelerator for the training, as ``"cpu"`` or ``"auto"``.
        random_state: Seed of the initial weights and of the batches.
        source: Label of the source's rows where ``y`` are labels; by default that of all rows that are not the
            target's, and of two labels the first in order.
        target: Label of the target's rows, likewise; of two labels the second. Rows of a third label are left out
            where both are given.

    Attributes:
        model_: The trained :class:`~lightning_gap.MongeMap`, between represented features.
        representation_: The scikit-learn pipeline to these.
        n_features_in_: Number of features.
        feature_names_in_: Their names, where ``X`` has names.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> X, y = rng.normal(size=(200, 2)), 0.5 * rng.normal(size=(150, 2)) + [3, 0]
        >>> transformer = MongeMapTransformer(max_steps=150, learning_rate=1e-2, hidden=(32,), random_state=0)
        >>> moved = transformer.fit(X, y).transform(X)
        >>> bool(np.abs(moved.mean(0) - y.mean(0)).max() < 0.2)
        True
        >>> cells, treated = np.concatenate([X, y]), ["control"] * 200 + ["drug"] * 150
        >>> bool(np.array_equal(transformer.fit(cells, treated).transform(X), moved))
        True
    """

    def __init__(
        self,
        cost: CostLike = "sqeuclidean",
        *,
        fitting_cost: CostLike = "sqeuclidean",
        gap_weight: float | None = None,
        hidden: Sequence[int] | None = None,
        max_steps: int = 1000,
        batch_size: int = 256,
        learning_rate: float | None = None,
        fitting_epsilon: float | None = None,
        gap_epsilon: float | None = None,
        standardize: bool = True,
        n_components: int | None = None,
        accelerator: str = "cpu",
        random_state: Any = None,
        source: Any = None,
        target: Any = None,
    ) -> None:
        # As scikit-learn wants it: kept as given, and checked by fit.
        self.cost = cost
        self.fitting_cost = fitting_cost
        self.gap_weight = gap_weight
        self.hidden = hidden
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.fitting_epsilon = fitting_epsilon
        self.gap_epsilon = gap_epsilon
        self.standardize = standardize
        self.n_components = n_components
        self.accelerator = accelerator
        self.random_state = random_state
        self.source = source
        self.target = target

    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> "MongeMapTransformer":
        """Learn the map.

        Args:
            X: ``(n, d)`` samples of the source, at least two; or of both source and target.
            y: ``(m, d)`` samples of the target; or ``(n,)`` labels of the rows of ``X``.

        Returns:
            The transformer itself.

        Raises:
            ValueError: Samples or an option cannot be used, a column of ``X`` is missing in ``y``, or labels do not
                tell source from target.
        """
        if y is None:
            raise ValueError(
                "MongeMapTransformer requires y to be passed, but the target y is None: give fit(X, y) two samples, or "
                "the labels of source and target"
            )
        for name, value in (("max_steps", self.max_steps), ("batch_size", self.batch_size)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")
        samples = validate_data(self, X, dtype=_DTYPES, ensure_min_samples=2)
        source, target = self._sides(samples, X, y)
        for name, side in (("source", source), ("target", target)):
            if len(side) < 2:
                raise ValueError(
                    f"the {name} has {len(side)} sample, and a map needs two at least: give more rows of it"
                )
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        representation = make_pipeline(
            StandardScaler() if self.standardize else FunctionTransformer(),
            FunctionTransformer() if self.n_components is None else PCA(self.n_components, random_state=seed),
        ).fit(np.concatenate([source, target.astype(source.dtype)]))
        x, z = (
            torch.from_numpy(np.array(representation.transform(samples), dtype=np.float32))
            for samples in (source, target)
        )
        with isolate_rng(), quiet():
            torch.manual_seed(seed)
            data = SamplesDataModule(
                x, z, batch_size=int(min(self.batch_size, len(x), len(z))), val_fraction=0.0, seed=seed
            )
            given = ("cost", "fitting_cost", "gap_weight", "fitting_epsilon", "gap_epsilon")
            options: dict[str, Any] = {name: getattr(self, name) for name in given}
            if self.learning_rate is not None:
                options["optimizer"] = partial(Adam, lr=float(self.learning_rate))
                options["lr_scheduler"] = partial(CosineAnnealingLR, T_max=int(self.max_steps))
            model = MongeMap(x.shape[1], hidden=None if self.hidden is None else tuple(self.hidden), **options)
            trainer = plain_trainer(
                int(self.max_steps),
                accelerator=self.accelerator,
                # Not of a cluster's job or of torchrun, whose processes would each wait for the others.
                plugins=LightningEnvironment(),
            )
            trainer.fit(model, data)
        # Without the trainer, which would keep the samples alive; in double, so that a sample's image does not depend
        # on the samples beside it.
        model.trainer = None
        self.model_ = model.to("cpu", torch.float64).eval()
        self.representation_ = representation
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.floating[Any]]:
        """Return the images of samples.

        Args:
            X: ``(n, d)`` samples.

        Returns:
            ``(n, d)`` images, of the precision of ``X``.

        Raises:
            NotFittedError: ``fit`` has not been called.
            ValueError: The samples cannot be used.
        """
        check_is_fitted(self)
        return self._through(validate_data(self, X, dtype=_DTYPES, reset=False), "transport")

    def inverse_transform(self, X: ArrayLike) -> NDArray[np.floating[Any]]:
        """Return the samples whose images are given, solved for each sample; see :meth:`MongeMap.inverse`.

        With ``n_components`` they lie in the span of the components.

        Args:
            X: ``(n, d)`` samples. Those without names go by place, since ``transform`` returns arrays.

        Returns:
            ``(n, d)`` samples, of the precision of ``X``. Where none was found, which is warned of, the nearest.

        Raises:
            NotFittedError: ``fit`` has not been called.
            ValueError: The samples cannot be used.
        """
        check_is_fitted(self)
        if names_of(X) is not None:
            samples = validate_data(self, X, dtype=_DTYPES, reset=False)
        else:
            samples = check_array(X, dtype=_DTYPES, input_name="X")
            if samples.shape[1] != self.n_features_in_:
                raise ValueError(
                    f"X has {samples.shape[1]} features, but MongeMapTransformer is expecting {self.n_features_in_} "
                    "features as input"
                )
        return self._through(samples, "inverse")

    def _through(self, samples: NDArray[Any], method: str) -> NDArray[np.floating[Any]]:
        """Return what a method of the map makes of samples."""
        encoded = torch.from_numpy(np.array(self.representation_.transform(samples), dtype=np.float64))
        images = self.representation_.inverse_transform(getattr(self.model_, method)(encoded).numpy())
        return np.asarray(images, dtype=samples.dtype)

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Return minus the Sinkhorn divergence between images and target, in the features' own units.

        Its epsilon is 5 % of the mean cost within the target, outliers aside, whatever the estimator's parameters, so
        that these compare.

        Args:
            X: ``(n, d)`` samples of the source; or of both source and target.
            y: ``(m, d)`` samples of the target; or ``(n,)`` labels of the rows of ``X``.

        Raises:
            NotFittedError: ``fit`` has not been called.
            ValueError: The samples cannot be used.
        """
        check_is_fitted(self)
        given = validate_data(self, X, dtype=_DTYPES, reset=False)
        source, target = self._sides(given, X, y)
        moved, z = (
            torch.from_numpy(np.array(x, dtype=np.float64)) for x in (self._through(source, "transport"), target)
        )
        cost = resolve(self.fitting_cost)
        within = few_of([(Weighted(z), Weighted(z))], lambda few: few)
        epsilon = Epsilon(None, FITTING_SHARE, "typical").resolve(cost, *within)
        return -float(sinkhorn_divergence(moved, z, cost=cost, epsilon=epsilon))

    def _sides(self, samples: NDArray[Any], X: Any, y: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the samples of source and target."""
        labels = np.asarray(y)
        if _is_column(labels, samples):
            labels = column_or_1d(labels, warn=True)
        if labels.ndim == 1:
            check_consistent_length(samples, labels)
            chosen = _two_sides(labels, self.source, self.target)
            return samples[chosen[0]], samples[chosen[1]]
        for name in ("source", "target"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is a label, but y has samples and no labels: leave {name} out, or "
                    "give the labels of the rows of X as y"
                )
        target: NDArray[Any] = check_array(columns_like("y", y, X, "X"), dtype=_DTYPES, input_name="y")
        if target.shape[1] != self.n_features_in_:
            raise ValueError(
                f"y has {target.shape[1]} features, but X has {self.n_features_in_}: give samples of one space, or "
                "labels of the rows of X, one-dimensional"
            )
        return samples, target

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        # Labels are of two populations; it is no classifier, which estimator_type would say.
        tags.classifier_tags = ClassifierTags(multi_class=False)
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _is_column(given: NDArray[Any], samples: NDArray[Any]) -> bool:
    """Return whether a column is of labels: a sample of another dimension, or of no numbers, is none."""
    if given.ndim != 2 or given.shape != (len(samples), 1):
        return False
    texts = given.dtype.kind in "USb" or (given.dtype == object and any(isinstance(v, str) for v in given[:, 0]))
    return texts or samples.shape[1] > 1


def _is_missing(label: Any) -> bool:
    try:
        return label is None or bool(label != label)
    except TypeError:  # the missing value of pandas has no truth value
        return True


def _two_sides(labels: NDArray[Any], source: Any, target: Any) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which rows are the source and which the target, by their ``(n,)`` labels."""
    if any(map(_is_missing, labels.tolist())):
        raise ValueError("y holds labels that are None or NaN: give a label to each row, or leave the row out")
    try:
        found = np.unique(labels).tolist()
    except TypeError:
        raise ValueError("the labels of y are of several types, and have no order: make them all text") from None
    for name, label in (("source", source), ("target", target)):
        if label is not None and label not in found:
            raise ValueError(f"{name}={label!r} is no label of y, which has {listed(found, 6)}")
    if source is None and target is None:
        if len(found) != 2:
            counted = f"{len(found)} {'class' if len(found) == 1 else 'classes'}"
            raise ValueError(
                f"as labels y must have two values, of source and target, got {counted}: name source and target, or "
                "give the target's samples as y"
            )
        source, target = found
    chosen = (
        labels == source if source is not None else labels != target,
        labels == target if target is not None else labels != source,
    )
    if source == target or not (chosen[0].any() and chosen[1].any()):
        raise ValueError(
            f"source={source!r} and target={target!r} leave no row to one side: give labels of both populations"
        )
    return chosen
