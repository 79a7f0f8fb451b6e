"""Distances with pertpy's names: its own values, and definitions by loops."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from benchmarks.science.pertpy_distances import OPTIONS, made_sets
from lightning_gap.monge.scores import DISTANCES, perturbation_distance

SETS = made_sets()

# By pertpy 1.0.3, of both sets; benchmarks/science/pertpy_distances.py makes them anew.
GOLDEN = {
    "edistance": (0.9240294799629769, 10.960071595413702),
    "euclidean": (1.477057412757574, 15.893287804045528),
    "root_mean_squared_error": (1.477057412757574, 15.893287804045528),
    "mse": (0.3636164334303497, 42.099432870370386),
    "mean_absolute_error": (0.5022907335188935, 5.243055555555556),
    "pearson_distance": (1.916094810241285, 0.007833143543563903),
    "spearman_distance": (1.7714285714285714, 0.0),
    "kendalltau_distance": (12.000000000000002, 8.326672684688674e-16),
    "cosine_distance": (1.0731105296541448, 0.020923412282022547),
    "r2_distance": (1223.5852554902458, 17.28522787483933),
    "mean_pairwise": (2.827642887776437, 29.12434537454202),
    "mmd": (2.1816986005820973, 252.59659722222227),
    "mmd rbf": (0.21804347578491945, 0.06102732664925774),
    "mmd poly": (1.1402935936969778, 191874.33880208334),
    "wasserstein": (3.687187145451299, 461.94491601568984),
    "sym_kldiv": (0.8478162401687817, 1.169084208552499),
    "t_test": (2.9567475583137863, 2.7371757475809777),
    "ks_test": (0.3194444444444444, 0.29583333333333334),
    "mean_var_distribution": (0.005382040158311352, 0.0038026171886059823),
    "mahalanobis": (4.64923922079797, 4.372539867744264),
}
# Its solver stops early, and in single precision; by the same code in double precision, at 1e-9:
CONVERGED = {"embedding": 3.6871894148121114, "positive": 461.9450324344275}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("kind", SETS)
def test_values_are_pertpy_s(name, kind):
    expected = GOLDEN[name][list(SETS).index(kind)]
    value = perturbation_distance(*SETS[kind], name.split()[0], **OPTIONS.get(name, {}))
    assert value == pytest.approx(expected, rel=1e-6 if name == "wasserstein" else 1e-8, abs=1e-12)


def test_every_metric_has_a_value_of_pertpy():
    assert {name.split()[0] for name in GOLDEN} == set(DISTANCES)


@pytest.mark.parametrize("kind", SETS)
def test_the_regularized_cost_is_the_converged_one(kind):
    value = perturbation_distance(*SETS[kind], "wasserstein", tolerance=1e-8)
    assert value == pytest.approx(CONVERGED[kind], rel=1e-9)


@pytest.mark.parametrize("metric", sorted(set(DISTANCES) - {"mean_var_distribution", "wasserstein"}))
def test_tensors_sparse_matrices_and_single_precision_are_the_same(metric):
    x, y = SETS["positive"]  # whole numbers, which float32 holds
    expected = perturbation_distance(x, y, metric)
    assert perturbation_distance(torch.tensor(x), csr_matrix(y), metric) == expected
    assert perturbation_distance(x.astype(np.float32), y.astype(int), metric) == expected


@pytest.mark.parametrize("metric", sorted(DISTANCES))
def test_a_population_is_at_no_distance_from_itself(metric):
    x, _ = SETS["positive"]
    value = perturbation_distance(x, x, metric)
    if metric == "mean_pairwise":
        pairs = np.mean([np.linalg.norm(a - b) for a in x for b in x])
        assert value == pytest.approx(pairs)
    elif metric == "wasserstein":  # not debiased
        assert value > 0
    else:
        assert value == pytest.approx(0, abs=1e-10)


def test_cells_that_all_lie_at_one_point_each():
    x, y = np.zeros((3, 2)), np.full((4, 2), 2.0)
    assert perturbation_distance(x, y, "wasserstein") == 8
    assert perturbation_distance(x, y, "mse") == 4


@pytest.mark.parametrize(
    ("x", "y", "metric", "options", "error", "message"),
    [
        (np.ones((3, 2)), np.ones((3, 2)), "emd", {}, ValueError, "metric must be one of edistance, euclidean"),
        (np.ones((3, 2)), np.ones((3, 2)), "nb_ll", {}, ValueError, "'nb_ll' is not computed here: its values"),
        (np.ones((3, 2)), np.ones((3, 3)), "mse", {}, ValueError, "x has 2 features and y 3"),
        (np.ones(3), np.ones((3, 2)), "mse", {}, ValueError, r"x must have shape \(n, d\)"),
        (np.ones((3, 2)), np.full((3, 2), np.nan), "mse", {}, ValueError, "y holds NaN"),
        (np.ones((3, 2)), np.ones((3, 2)), "mse", {"gamma": 1}, TypeError, "'mse' has no option 'gamma'"),
        (np.ones((3, 2)), np.ones((3, 2)), "mmd", {"kernel": "cosine"}, ValueError, "kernel must be 'linear'"),
        (np.ones((1, 2)), np.ones((3, 2)), "t_test", {}, ValueError, "needs 2 cells on each side at least, got 1"),
        (np.ones((3, 1)), np.ones((3, 1)), "pearson_distance", {}, ValueError, "needs 2 features at least, got 1"),
        (np.eye(2), np.eye(2), "mahalanobis", {}, ValueError, "leave singular"),
        (-np.ones((3, 2)), np.ones((3, 2)), "mean_var_distribution", {}, ValueError, "x needs features of positive"),
    ],
)
def test_what_has_no_distance_is_refused(x, y, metric, options, error, message):
    with pytest.raises(error, match=message):
        perturbation_distance(x, y, metric, **options)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("metric", "why"),
    [
        ("pearson_distance", "same in all features"),
        ("spearman_distance", "same in all features"),
        ("kendalltau_distance", "same in all features"),
        ("cosine_distance", "all 0"),
        ("r2_distance", "means of x are the same"),
    ],
)
def test_a_distance_without_a_value_is_refused(metric, why):
    some = np.array([[0.0, 1.0, 3.0], [1.0, 1.0, 2.0]])
    for other in (some, np.zeros((4, 3))):
        with pytest.raises(ValueError, match=rf"metric='{metric}' of x and y is (nan|inf): .*{why}.*'euclidean'"):
            perturbation_distance(np.zeros((4, 3)), other, metric)


def test_tensors_of_half_precision_are_cells():
    x = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    for dtype in (torch.bfloat16, torch.float16):
        assert perturbation_distance(x.to(dtype), (x + 3).to(dtype), "mse") == 9
