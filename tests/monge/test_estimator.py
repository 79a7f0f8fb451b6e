"""MongeMapTransformer: scikit-learn's checks, and a fit without side effects."""

import pickle
import random

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", minversion="1.6")
from sklearn.base import clone, is_classifier
from sklearn.exceptions import DataConversionWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks, get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks

from lightning_gap.monge.estimator import MongeMapTransformer

RNG = np.random.default_rng(2)
X, Y = RNG.normal(size=(80, 3)), 0.5 * RNG.normal(size=(60, 3)) + [3, 0, -1]
QUICK = {"hidden": (4,), "max_steps": 2, "random_state": 0}


# None fails. A check that cannot hold would stand here, by its name and with the reason.
EXPECTED_FAILED_CHECKS = {}


@parametrize_with_checks(
    [MongeMapTransformer(**QUICK)], expected_failed_checks=lambda estimator: EXPECTED_FAILED_CHECKS
)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.filterwarnings("ignore:X .*feature names")
@pytest.mark.parametrize(
    "check",
    [
        "check_dataframe_column_names_consistency",
        "check_global_output_transform_pandas",
        "check_set_output_transform",
        "check_set_output_transform_pandas",
        "check_transformer_get_feature_names_out",
        "check_transformer_get_feature_names_out_pandas",
    ],
)
def test_checks_that_scikit_learn_keeps_for_its_own_estimators(check):
    pytest.importorskip("pandas")
    if not hasattr(estimator_checks, check):
        pytest.skip(f"this release of scikit-learn has no {check}")
    getattr(estimator_checks, check)("MongeMapTransformer", MongeMapTransformer(**QUICK))


def test_its_tags():
    tags = get_tags(MongeMapTransformer())
    assert tags.target_tags.required
    assert tags.transformer_tags.preserves_dtype == ["float64", "float32"]
    assert not is_classifier(MongeMapTransformer())


def test_it_learns_a_map_between_samples_of_any_sizes():
    transformer = MongeMapTransformer(max_steps=60, learning_rate=5e-2, hidden=(16,), random_state=0)
    moved = transformer.fit(X, Y).transform(X)
    assert moved.shape == X.shape
    np.testing.assert_allclose(moved.mean(0), Y.mean(0), atol=0.15)
    np.testing.assert_allclose(moved.std(0), Y.std(0), rtol=0.35)
    shifted = X - X.mean(0) + Y.mean(0)
    assert transformer.score(X, Y) > transformer.fit(X, shifted).score(X, Y)


def test_a_second_fit_begins_anew_and_seeds_decide():
    transformer = MongeMapTransformer(**QUICK)
    first = transformer.fit(X, Y).transform(X)
    transformer.fit(X + 10, Y * 3)
    assert np.array_equal(transformer.fit(X, Y).transform(X), first)
    assert not np.array_equal(MongeMapTransformer(**QUICK).fit(X, Y * 3).transform(X), first)
    seeded = [MongeMapTransformer("euclidean", **{**QUICK, "random_state": k}).fit_transform(X, Y) for k in (0, 1)]
    assert not np.array_equal(*seeded)
    assert np.array_equal(clone(transformer).fit_transform(X, Y), first)


def test_a_fit_leaves_no_trace(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    x, y = X.copy(), Y.copy()
    MongeMapTransformer(**QUICK).fit(X, Y).transform(X)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert random.getstate() == state[2]
    assert np.array_equal(X, x)
    assert np.array_equal(Y, y)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_pickled_it_maps_the_same_without_its_samples():
    transformer = MongeMapTransformer(**QUICK).fit(X, Y)
    text = pickle.dumps(transformer)
    assert np.array_equal(pickle.loads(text).transform(X), transformer.transform(X))
    assert len(text) < 40_000
    encoded = transformer.representation_.transform(X)
    for kept in (X, X.astype(np.float32), encoded, encoded.astype(np.float32)):
        assert not any(row.tobytes() in text for row in kept)


def test_names_of_features():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=["CD3", "CD4", "CD8"])
    transformer = MongeMapTransformer(**QUICK).set_output(transform="pandas")
    moved = transformer.fit_transform(frame, Y)
    assert list(moved.columns) == list(transformer.get_feature_names_out()) == ["CD3", "CD4", "CD8"]
    np.testing.assert_array_equal(moved, MongeMapTransformer(**QUICK).fit(X, Y).transform(X))


def test_components_and_scales():
    scale = np.array([1.0, 1e4, 1e-3])
    options = {**QUICK, "max_steps": 40, "learning_rate": 1e-1}
    moved = MongeMapTransformer(**options).fit(X * scale, Y * scale).transform(X * scale)
    np.testing.assert_allclose(moved.mean(0) / scale, Y.mean(0), atol=0.3)
    projected = MongeMapTransformer(**QUICK, n_components=2).fit(X, Y).transform(X)
    assert projected.shape == X.shape
    assert np.linalg.matrix_rank(projected - projected.mean(0), tol=1e-6) == 2
    raw = MongeMapTransformer(**QUICK, standardize=False).fit(X, Y)
    assert raw.model_.fitting_epsilon == pytest.approx(0.05 * 2 * Y.var(0).sum(), rel=1e-5)


def test_the_inverse_transform_undoes_the_transform():
    transformer = MongeMapTransformer(**{**QUICK, "max_steps": 20}).fit(X, Y)
    np.testing.assert_allclose(transformer.inverse_transform(transformer.transform(X)), X, atol=1e-3)
    few = MongeMapTransformer(**QUICK, n_components=2).fit(X, Y)
    moved = few.transform(X)
    back = few.inverse_transform(moved.astype(np.float32))
    assert back.dtype == np.float32
    np.testing.assert_allclose(few.transform(back), moved, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_images_do_not_depend_on_the_samples_beside_them(dtype):
    transformer = MongeMapTransformer(**QUICK).fit(X, Y)
    x = X.astype(dtype)
    moved = transformer.transform(x)
    assert moved.dtype == dtype
    np.testing.assert_allclose(np.concatenate([transformer.transform(row[None]) for row in x]), moved, rtol=1e-6)


def test_in_pipelines_and_model_selection():
    pipeline = make_pipeline(StandardScaler(), MongeMapTransformer(**QUICK))
    assert pipeline.fit(X[:60], Y).transform(X).shape == X.shape
    search = GridSearchCV(MongeMapTransformer(**QUICK), {"n_components": [1, 3]}, cv=2, error_score="raise")
    search.fit(X[:60], Y)
    assert search.best_params_ == {"n_components": 3}


CELLS, SIDES = np.concatenate([X, Y]), np.array(["control"] * len(X) + ["stim"] * len(Y))


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (SIDES, {}),
        (list(SIDES), {"source": "control"}),
        (SIDES.astype(object), {"target": "stim"}),
        (np.where(SIDES == "stim", 0, 1), {"source": 1, "target": 0}),
        (SIDES == "stim", {}),
    ],
)
def test_labels_tell_source_from_target(labels, options):
    expected = MongeMapTransformer(**QUICK).fit(X, Y)
    fitted = MongeMapTransformer(**QUICK, **options).fit(CELLS, labels)
    assert np.array_equal(fitted.transform(X), expected.transform(X))
    assert fitted.score(CELLS, labels) == expected.score(X, Y)


def test_rows_of_a_third_label_are_left_out_or_on_the_side_that_has_no_name():
    third = RNG.normal(size=(30, 3)).astype(float)
    cells, labels = np.concatenate([CELLS, third]), np.append(SIDES, ["other"] * 30)
    expected = MongeMapTransformer(**QUICK).fit(X, Y).transform(X)
    fitted = MongeMapTransformer(**QUICK, source="control", target="stim").fit(cells, labels)
    assert np.array_equal(fitted.transform(X), expected)
    fitted = MongeMapTransformer(**QUICK, source="control").fit(cells, labels)
    assert np.array_equal(fitted.transform(X), MongeMapTransformer(**QUICK).fit(X, cells[80:]).transform(X))


def test_labels_go_through_pipelines_and_model_selection():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(CELLS * 10 + 5, columns=["CD3", "CD4", "CD8"])
    series = pandas.Series(SIDES, index=frame.index)
    pipeline = make_pipeline(StandardScaler(), MongeMapTransformer(**QUICK, standardize=False))
    pipeline.set_output(transform="pandas").fit(frame, series)
    moved = pipeline.transform(frame)
    assert list(moved.columns) == list(pipeline.get_feature_names_out()) == list(frame.columns)
    # What pipelines hand back is an array in between, which is by place and no cause of a warning.
    np.testing.assert_allclose(pipeline.inverse_transform(moved), frame, atol=2e-2)
    scaled = StandardScaler().fit_transform(frame)
    expected = MongeMapTransformer(**QUICK, standardize=False).fit(scaled[:80], scaled[80:])
    np.testing.assert_allclose(moved, expected.transform(scaled), rtol=1e-12)
    folds = StratifiedKFold(2, shuffle=True, random_state=0)
    scores = cross_val_score(pipeline, frame, series, cv=folds, error_score="raise")
    assert np.isfinite(scores).all()
    search = GridSearchCV(pipeline, {"mongemaptransformer__gap_weight": [0.0, 1.0]}, cv=folds, error_score="raise")
    assert search.fit(frame, series).transform(frame).shape == frame.shape


def test_the_inverse_goes_by_place_where_images_have_no_names():
    pandas = pytest.importorskip("pandas")
    names = ["CD3", "CD4", "CD8"]
    fitted = MongeMapTransformer(**QUICK).fit(pandas.DataFrame(X, columns=names), Y)
    back = fitted.inverse_transform(fitted.transform(pandas.DataFrame(X, columns=names)))
    np.testing.assert_allclose(back, X, atol=1e-3)
    with pytest.raises(ValueError, match="Feature names must be in the same order"):
        fitted.inverse_transform(pandas.DataFrame(X, columns=names[::-1]))
    with pytest.raises(ValueError, match="X has 2 features, but MongeMapTransformer is expecting 3"):
        fitted.inverse_transform(X[:, :2])


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a"] * 140, {}, "must have two values, of source and target, got 1 class"),
        (np.arange(140), {}, "got 140 classes: name source and target"),
        (SIDES, {"source": "ctrl"}, "source='ctrl' is no label of y, which has"),
        (SIDES, {"source": "stim", "target": "stim"}, "leave no row to one side"),
        (["a"] * 140, {"source": "a"}, "leave no row to one side"),
        ([None, *SIDES[1:]], {}, "labels that are None or NaN"),
        (["a", *["b"] * 139], {}, "the source has 1 sample, and a map needs two at least"),
        ([*["a"] * 139, "b"], {}, "the target has 1 sample, and a map needs two at least"),
        ([1, *SIDES[1:].tolist()], {}, "must have two values|several types"),
        (SIDES[:-1], {}, "inconsistent numbers of samples"),
    ],
)
def test_labels_that_tell_no_sides_are_refused(labels, options, message):
    labels = np.array(labels, dtype=object) if isinstance(labels, list) else labels
    with pytest.raises(ValueError, match=message):
        MongeMapTransformer(**QUICK, **options).fit(CELLS, labels)


def test_a_missing_label_of_pandas_is_refused():
    pandas = pytest.importorskip("pandas")
    labels = pandas.Series([pandas.NA, *SIDES[1:]], dtype="string")
    with pytest.raises(ValueError, match="labels that are None or NaN"):
        MongeMapTransformer(**QUICK).fit(CELLS, labels)


def test_a_column_of_labels_is_taken_as_labels():
    pandas = pytest.importorskip("pandas")
    expected = MongeMapTransformer(**QUICK).fit(CELLS, SIDES).transform(X)
    for column in (SIDES[:, None], pandas.DataFrame({"side": SIDES}), (SIDES == "stim").astype(float)[:, None]):
        with pytest.warns(DataConversionWarning, match="column-vector y was passed"):
            fitted = MongeMapTransformer(**QUICK).fit(CELLS, column)
        assert np.array_equal(fitted.transform(X), expected)
    with pytest.warns(DataConversionWarning):
        MongeMapTransformer(**QUICK).fit(CELLS[:, :1], SIDES[:, None])
    # Numbers beside one feature are samples.
    assert MongeMapTransformer(**QUICK).fit(X[:, :1], X[:, :1] + 1).transform(X[:, :1]).shape == (len(X), 1)


def test_options_reach_the_map():
    transformer = MongeMapTransformer(
        "euclidean", fitting_cost="pnorm(p=1.5)", gap_weight=0.5, fitting_epsilon=0.7, gap_epsilon=0.2, **QUICK
    ).fit(X, Y)
    model = transformer.model_
    assert (str(model.cost), str(model.fitting_cost), model.gap_weight) == ("euclidean", "pnorm(p=1.5)", 0.5)
    assert (float(model.fitting_epsilon), float(model.gap_epsilon)) == (pytest.approx(0.7), pytest.approx(0.2))


@pytest.mark.parametrize(
    ("options", "y", "message"),
    [
        ({}, None, "requires y to be passed, but the target y is None"),
        ({"source": 1}, Y, "source=1 is a label, but y has samples and no labels"),
        ({}, np.zeros(80), "got 1 class"),
        ({}, Y[:, :2], "y has 2 features, but X has 3"),
        ({"max_steps": 0}, Y, "max_steps must be a positive integer, got 0"),
        ({"batch_size": 1.5}, Y, "batch_size must be a positive integer, got 1.5"),
        ({"learning_rate": 0}, Y, "learning_rate must be positive, got 0"),
        ({"gap_weight": -1}, Y, "gap_weight must be a finite number of at least 0"),
        ({"cost": "euclid"}, Y, "unknown cost"),
        ({"fitting_cost": "euclidean"}, np.ones((5, 3)), "fitting_epsilon cannot be decided"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options, y, message):
    with pytest.raises(ValueError, match=message):
        MongeMapTransformer(**{**QUICK, **options}).fit(X, y)


def test_it_must_be_fitted_first():
    with pytest.raises(NotFittedError):
        MongeMapTransformer().transform(X)


@pytest.mark.parametrize("names", [["CD3", "CD4", "CD8"], [7, 3, 5], [2, 0, 1]])
def test_columns_of_the_target_are_matched_by_name(names):
    pandas = pytest.importorskip("pandas")
    x, y = pandas.DataFrame(X, columns=names), pandas.DataFrame(Y, columns=names)
    expected = MongeMapTransformer(**QUICK).fit(X, Y)

    def agrees(fitted: MongeMapTransformer) -> None:
        np.testing.assert_allclose(fitted.transform(x), expected.transform(X), rtol=1e-5, atol=1e-7)

    for order in (list(reversed(names)), sorted(names), names):
        fitted = MongeMapTransformer(**QUICK).fit(x, y[order])
        agrees(fitted)
        assert fitted.score(x, y[order]) == pytest.approx(expected.score(X, Y), rel=1e-4)
    with pytest.warns(UserWarning, match="y has 'batch', which X does not know: ignored"):
        agrees(MongeMapTransformer(**QUICK).fit(x, y.assign(batch="first")))
    with pytest.raises(ValueError, match=rf"y has no '{names[1]}', which X has among its features"):
        MongeMapTransformer(**QUICK).fit(x, y.drop(columns=names[1]).assign(other=1.0))
    if isinstance(names[0], str):
        # Where one side has no names they go by place, and transform keeps to scikit-learn's rule.
        agrees(MongeMapTransformer(**QUICK).fit(x, Y))
        fitted = MongeMapTransformer(**QUICK).fit(x, pandas.DataFrame(Y))
        agrees(fitted)
        with pytest.raises(ValueError, match="Feature names must be in the same order"):
            fitted.transform(x[list(reversed(names))])
