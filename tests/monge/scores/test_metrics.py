"""The metrics: what they measure, and that they add up over batches, copies and processes."""

import copy
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from gloo import enter_world, free_port, leave_world, start_processes

from lightning_gap import costs, monge_gap, sinkhorn_divergence
from lightning_gap.monge import (
    DisplacementCosine,
    EnergyDistance,
    MapScores,
    MongeGap,
    SinkhornDivergence,
    UnexplainedVariance,
    displacement_cosine,
    energy_distance,
    unexplained_variance,
)
from lightning_gap.monge.scores import (
    DrugSignature,
    EntropicWasserstein,
    FeatureMeansR2,
    MaximumMeanDiscrepancy,
    drug_signature,
    entropic_wasserstein,
    feature_means_r2,
    maximum_mean_discrepancy,
)

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 3, generator=GENERATOR)
T = X.flip(1) + 0.3 * torch.randn(60, 3, generator=GENERATOR)
TRUE = 2 * X + 1

# Each metric with the arguments of its update.
CASES = {
    "gap": (MongeGap, {}, (X, T)),
    "exact gap": (MongeGap, {"solver": "exact", "cost": "euclidean"}, (X, T)),
    "debiased gap": (MongeGap, {"convention": "debiased", "epsilon": 0.1}, (X, T)),
    "divergence": (SinkhornDivergence, {"cost": "euclidean"}, (X, T)),
    "energy": (EnergyDistance, {}, (X, T)),
    "variance": (UnexplainedVariance, {}, (T, TRUE)),
    "cosine": (DisplacementCosine, {}, (X, T, TRUE)),
    "r2": (FeatureMeansR2, {}, (X, T)),
    "signature": (DrugSignature, {}, (X, T)),
    "mmd": (MaximumMeanDiscrepancy, {}, (X, T)),
    "wasserstein": (EntropicWasserstein, {"tolerance": 1e-6}, (X, T)),
}
metrics = pytest.mark.parametrize("case", CASES)


def distances(x, y):
    """By differences: those that ``torch.cdist`` takes from a Gram matrix vary with the processor."""
    return (x.double()[:, None] - y.double()).norm(dim=-1)


def whole(case):
    metric_class, options, data = CASES[case]
    metric = metric_class(**options)
    metric.update(*data)
    return metric


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("gap", lambda: monge_gap(X, T)),
        ("exact gap", lambda: monge_gap(X, T, solver="exact", cost="euclidean")),
        ("debiased gap", lambda: monge_gap(X, T, convention="debiased", epsilon=0.1)),
        ("divergence", lambda: sinkhorn_divergence(X, T, cost="euclidean")),
        ("energy", lambda: 2 * distances(X, T).mean() - distances(X, X).mean() - distances(T, T).mean()),
        ("variance", lambda: 100 * (T - TRUE).square().sum(1).mean() / TRUE.var(0, correction=0).sum()),
        ("cosine", lambda: torch.cosine_similarity((T - X).flatten(), (TRUE - X).flatten(), dim=0)),
        ("r2", lambda: feature_means_r2(X, T)),
        ("signature", lambda: drug_signature(X, T)),
        ("mmd", lambda: maximum_mean_discrepancy(X, T)),
        ("wasserstein", lambda: entropic_wasserstein(X, T, tolerance=1e-6)),
    ],
)
def test_values_are_the_definitions(case, expected):
    torch.testing.assert_close(whole(case).compute().double(), expected().double(), rtol=1e-5, atol=1e-5)


@metrics
def test_batches_add_up_to_the_whole(case):
    metric_class, options, data = CASES[case]
    metric = metric_class(**options)
    for part in zip(*(d.split([7, 30, 1, 22]) for d in data), strict=True):
        metric.update(*part)
    expected = whole(case).compute()
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(metric.compute(), metric.compute())


@metrics
def test_forward_gives_the_batch_and_keeps_the_whole(case):
    metric_class, options, data = CASES[case]
    metric = metric_class(**options)
    first, second = zip(*(d.split([20, 40]) for d in data), strict=True)
    metric(*first)
    alone = metric_class(**options)
    alone.update(*second)
    torch.testing.assert_close(metric(*second), alone.compute(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metric.compute(), whole(case).compute(), rtol=1e-5, atol=1e-6)


@metrics
def test_reset_forgets_and_copies_are_independent(case):
    metric = whole(case)
    value = metric.compute()
    for copied in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.to("cpu")):
        assert torch.equal(copied.compute(), value)
    clone = metric.clone()
    clone.reset()
    clone.update(*(d[:20] for d in CASES[case][2]))
    assert not torch.equal(clone.compute(), value)
    metric.reset()
    metric.update(*CASES[case][2])
    assert torch.equal(metric.compute(), value)


@metrics
def test_states_merge(case):
    metric_class, options, data = CASES[case]
    first, second = metric_class(**options), metric_class(**options)
    first.update(*(d[:25] for d in data))
    second.update(*(d[25:] for d in data))
    first.merge_state(second)
    torch.testing.assert_close(first.compute(), whole(case).compute(), rtol=1e-5, atol=1e-6)


@metrics
def test_nothing_that_was_given_is_kept_with_its_graph(case):
    metric_class, options, data = CASES[case]
    data = tuple(d.clone().requires_grad_() for d in data)
    metric = metric_class(**options)
    metric.update(*data)
    metric(*data)
    states = [getattr(metric, name) for name in metric._defaults]
    tensors = [t for state in states for t in (state if isinstance(state, list) else [state])]
    assert tensors
    assert not any(t.requires_grad for t in tensors)


@metrics
def test_metrics_draw_themselves(case):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    metric = whole(case)
    figure, axes = metric.plot()
    assert figure is not None
    assert axes.lines
    _, axes = metric.plot([metric.compute(), metric.compute() / 2])
    assert len(axes.lines[0].get_xdata()) == 2
    matplotlib.pyplot.close("all")


@metrics
def test_double_and_half_precision(case):
    metric_class, options, data = CASES[case]
    for dtype, close in ((torch.float64, 1e-3), (torch.bfloat16, 0.1)):
        metric = metric_class(**options)
        metric.update(*(d.to(dtype) for d in data))
        assert float(metric.compute()) == pytest.approx(float(whole(case).compute()), rel=close)


def test_samples_may_come_in_different_numbers():
    for metric, expected in (
        (SinkhornDivergence(), sinkhorn_divergence(X, T[:17])),
        (EnergyDistance(), energy_distance(X, T[:17])),
    ):
        metric.update(X[:50], T[:10])
        metric.update(X[50:], T[10:17])
        torch.testing.assert_close(metric.compute(), expected)


def test_special_values():
    true_map, constant, identity = UnexplainedVariance(), UnexplainedVariance(), DisplacementCosine()
    true_map.update(TRUE, TRUE)
    assert true_map.compute() == 0
    constant.update(TRUE.mean(0).expand_as(TRUE), TRUE)
    torch.testing.assert_close(constant.compute(), torch.tensor(100.0))
    identity.update(X, X, TRUE)
    assert identity.compute() == 0
    for sign in (1, -1):
        cosine = DisplacementCosine()
        cosine.update(X, X + 3 * sign * (TRUE - X), TRUE)
        torch.testing.assert_close(cosine.compute(), torch.tensor(float(sign)))


def test_variance_keeps_its_digits_far_from_the_origin():
    near, far = UnexplainedVariance(), UnexplainedVariance()
    near.update(T.double(), TRUE.double())
    far.update(T.double() + 1e5, TRUE.double() + 1e5)
    torch.testing.assert_close(far.compute(), near.compute(), rtol=1e-5, atol=0)


def test_old_names_and_functions_of_metrics_against_the_truth():
    variance, cosine = UnexplainedVariance(), DisplacementCosine()
    for name in ("true_images", "true_map"):
        variance.update(T, **{name: TRUE})
        cosine.update(X, T, **{name: TRUE})
    torch.testing.assert_close(variance.compute(), unexplained_variance(T, TRUE))
    torch.testing.assert_close(cosine.compute(), displacement_cosine(X, T, TRUE))
    with pytest.warns(DeprecationWarning, match="true_map is called true_images now"):
        variance.update(T, true_map=TRUE)
    for metric_class, options in ((MongeGap, {"convention": "kl"}), (SinkhornDivergence, {}), (MapScores, {})):
        with pytest.warns(DeprecationWarning, match="reach is called rho now"):
            assert metric_class(reach=2.0, **options).rho == 2.0


def test_no_variance_to_explain():
    metric = UnexplainedVariance()
    metric.update(X, torch.ones_like(X))
    with pytest.raises(ValueError, match=r"variance of the 60 true images is 0: .* at least two that differ"):
        metric.compute()


@pytest.mark.parametrize("metric_class", [MongeGap, SinkhornDivergence])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "fast"}, "solver must be one of auto, .*, got 'fast'"),
        ({"solver": "exact", "epsilon": 0.1}, "solver='exact' takes neither epsilon nor rho"),
        ({"epsilon": -1.0}, "epsilon must be a positive finite number, got -1.0"),
        ({"relative_epsilon": 0.0}, "relative_epsilon must be a positive finite number, got 0.0"),
        ({"cost": "euclid"}, "unknown cost 'euclid'"),
    ],
)
def test_options_are_checked_when_the_metric_is_made(metric_class, options, message):
    with pytest.raises(ValueError, match=message):
        metric_class(**options)


def test_options_of_the_gap():
    with pytest.raises(ValueError, match="convention must be one of shannon, kl, debiased, got 'l2'"):
        MongeGap(convention="l2")
    with pytest.raises(ValueError, match="rho needs convention='kl' or 'debiased'"):
        MongeGap(rho=1.0)


def test_bad_batches_are_named_and_change_nothing():
    for metric, args, message in (
        (MongeGap(), (X, T[:-1]), "x has 60 rows but mapped has 59"),
        (MongeGap("cosine"), (X, torch.zeros_like(X)), "mapped has 60 zero vectors"),
        (SinkhornDivergence(costs.Geodesic()), (2 * X, T), "x has .* points off the unit sphere"),
        (EnergyDistance(), (X, T / 0), "y holds NaN or infinity in 60 of 60 rows"),
        (UnexplainedVariance(), (X, T[:, :2]), "mapped has dimension 3 but true_images has 2"),
        (DisplacementCosine(), (X, T, T[:5]), "x has 60 rows but true_images has 5"),
    ):
        before = {name: copy.copy(getattr(metric, name)) for name in metric._defaults}
        with pytest.raises(ValueError, match=message):
            metric.update(*args)
        assert {name: getattr(metric, name) for name in metric._defaults} == before


def test_spaces_are_not_mixed():
    metric = EnergyDistance()
    metric.update(X, T)
    with pytest.raises(ValueError, match="x has dimension 2, but 3 in earlier updates"):
        metric.update(X[:, :2], T[:, :2])


def _process(rank, port, results):
    enter_world(rank, 2, port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for case, (metric_class, options, data) in CASES.items():
        metric = metric_class(**options)
        # Unequal shares, in unequal batches.
        share = [d[:35] if rank == 0 else d[35:] for d in data]
        for part in zip(*(d.split(10 + 3 * rank) for d in share), strict=True):
            metric.update(*part)
        results[rank, case] = float(metric.compute())
    leave_world()


@pytest.mark.distributed
def test_two_processes_are_as_one():
    with mp.Manager() as manager:
        results = manager.dict()
        start_processes(_process, (free_port(), results), 2)
        for case in CASES:
            expected = pytest.approx(float(whole(case).compute()), rel=1e-5)
            assert results[0, case] == results[1, case] == expected, case
