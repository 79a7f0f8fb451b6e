"""MapScores: their definitions, pooling, conditions, floors, processes."""

import copy
import logging
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from gloo import enter_world, free_port, leave_world, start_processes
from scored_samples import AGAIN, TRUE, A, B, D, M, N, T, X, Y, normal

from lightning_gap import monge_gap, sinkhorn_divergence
from lightning_gap.monge import (
    DisplacementCosine,
    MapScores,
    MarginalWasserstein,
    UnexplainedVariance,
    energy_distance,
    marginal_wasserstein,
)
from lightning_gap.monge.ot.costs import SqEuclidean
from lightning_gap.monge.samples.batches import HeldOut, HeldOutBatches
from lightning_gap.monge.samples.draws import FiniteSamples
from lightning_gap.monge.scores import map_scores
from lightning_gap.monge.scores.pools import Pool, typical_share

EPSILONS = {"fitting_epsilon": 0.5, "gap_epsilon": 0.2}
BASIC = {"sinkhorn_divergence", "energy_distance", "wasserstein_1", "monge_gap", "displacement"}
TRUTH = {"unexplained_variance", "displacement_cosine"}
FLOORS = {"sinkhorn_divergence_floor", "energy_distance_floor", "wasserstein_1_floor"}


def scored(*batches, **options) -> dict[str, torch.Tensor]:
    metric = MapScores(**options)
    for positional, named in batches:
        metric.update(*positional, **named)
    return metric.compute()


def same(got, expected, **close):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert float(got[name]) == pytest.approx(float(value), **{"rel": 1e-5, "abs": 5e-6, **close}), name


# --- MapScores ----------------------------------------------------------------------------------------------------


def test_scores_are_their_definitions():
    unexplained, cosine = UnexplainedVariance(), DisplacementCosine()
    unexplained.update(T, TRUE)
    cosine.update(X, T, TRUE)
    expected = {
        "sinkhorn_divergence": sinkhorn_divergence(T, Y, epsilon=0.5),
        "energy_distance": energy_distance(T, Y),
        "wasserstein_1": marginal_wasserstein(T, Y).mean(),
        "monge_gap": monge_gap(X, T, cost="euclidean", epsilon=0.2),
        "displacement": (T - X).norm(dim=1).mean(),
        "unexplained_variance": unexplained.compute(),
        "displacement_cosine": cosine.compute(),
        "sinkhorn_divergence_floor": sinkhorn_divergence(AGAIN, Y, epsilon=0.5),
        "energy_distance_floor": energy_distance(AGAIN, Y),
        "wasserstein_1_floor": marginal_wasserstein(AGAIN, Y).mean(),
    }
    batch = (X, T, Y), {"true_images": TRUE, "target_again": AGAIN}
    same(scored(batch, cost="euclidean", **EPSILONS), expected)


def test_weighted_scores_are_their_definitions():
    batch = (X, T, Y), {"source_weights": A, "target_weights": B, "true_images": TRUE, "target_again": AGAIN}
    got = scored(batch, convention="kl", **EPSILONS)
    unexplained, cosine = UnexplainedVariance(), DisplacementCosine()
    unexplained.update(T, TRUE, weights=A)
    cosine.update(X, T, TRUE, weights=A)
    expected = {
        "sinkhorn_divergence": sinkhorn_divergence(T, Y, epsilon=0.5, weights=(A, B)),
        "energy_distance": energy_distance(T, Y, weights=(A, B)),
        "wasserstein_1": marginal_wasserstein(T, Y, weights=(A, B)).mean(),
        "monge_gap": monge_gap(X, T, epsilon=0.2, weights=A, convention="kl"),
        "displacement": A @ (T - X).square().sum(1),
        "unexplained_variance": unexplained.compute(),
        "displacement_cosine": cosine.compute(),
        "sinkhorn_divergence_floor": sinkhorn_divergence(AGAIN[: len(A[A > 0])], Y, epsilon=0.5, weights=(None, B)),
    }
    # The floor takes as many samples as have weight, and by its own choice.
    floor = float(expected.pop("sinkhorn_divergence_floor"))
    assert float(got["sinkhorn_divergence_floor"]) == pytest.approx(floor, rel=0.5)
    same({name: value for name, value in got.items() if not name.endswith("_floor")}, expected, rel=1e-3)


def test_which_scores_there_are():
    assert set(scored(((X, T, Y), {}))) == BASIC
    assert set(scored(((X, T, Y), {"true_images": TRUE}))) == BASIC | TRUTH
    assert set(scored(((X, T, Y), {"target_again": AGAIN}))) == BASIC | FLOORS


def test_batches_are_pooled_copied_and_merged():
    whole = scored(((X, T, Y), {"true_images": TRUE, "target_again": AGAIN}), **EPSILONS)
    parts = [
        ((X[r], T[r], Y[s]), {"true_images": TRUE[r], "target_again": AGAIN[r]})
        for r, s in ((slice(0, 13), slice(0, 30)), (slice(13, N), slice(30, M)))
    ]
    same(scored(*parts, **EPSILONS), whole)
    first, second = MapScores(**EPSILONS), MapScores(**EPSILONS)
    first.update(*parts[0][0], **parts[0][1])
    second.update(*parts[1][0], **parts[1][1])
    first.merge_state(second)
    for metric in (first, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        same(metric.compute(), whole)
    first.reset()
    first.update(X, T, Y)
    assert set(first.compute()) == BASIC
    assert not first.state_dict()


def test_epsilons_do_not_depend_on_the_map():
    by_default = scored(((X, T, Y), {}))
    fitting = 0.05 * float(torch.cdist(Y, Y).square().mean())
    gap = 0.01 * float(torch.cdist(X, Y).square().mean())
    same(by_default, scored(((X, T, Y), {}), fitting_epsilon=fitting, gap_epsilon=gap))


@pytest.mark.parametrize("solver", ["auto", "exact"])
def test_a_target_that_is_one_point(solver):
    point = torch.ones(N, D)
    with pytest.warns(UserWarning, match="unexplained_variance is NaN: the variance of the 60 true images is 0"):
        got = scored(((X, X, point), {"true_images": point}), solver=solver)
    away = float((X - 1).square().sum(1).mean())
    # Everything goes to the one point: the cost, less half of the source's to itself where that is subtracted.
    self_cost = 0 if solver == "exact" else float(torch.cdist(X, X).square().mean()) / 2
    assert (away - self_cost) * (1 - 1e-5) <= float(got["sinkhorn_divergence"]) <= away * (1 + 1e-5)
    assert torch.isnan(got["unexplained_variance"])
    still = scored(((point, point, point), {}), solver=solver)
    assert all(float(value) == 0 for value in still.values())


def test_one_sample():
    got = scored(((X[:1], X[:1] + 1, X[:1] + 1), {"target_again": X[1:2]}), **EPSILONS)
    assert float(got["sinkhorn_divergence"]) == pytest.approx(0, abs=1e-6)
    assert float(got["displacement"]) == pytest.approx(D, rel=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
def test_conditions_are_averaged_and_named(ragged):
    each = [
        scored(((X[r], T[r], Y[s]), {"target_again": AGAIN[r], "true_images": TRUE[r]}), **EPSILONS)
        for r, s in ((slice(0, 30), slice(0, 20)), (slice(30, 60), slice(20, 40)))
    ]
    named = {"target_again": AGAIN.view(2, 30, D), "true_images": TRUE.view(2, 30, D)}
    batch = (X.view(2, 30, D), T.view(2, 30, D), Y[:40].view(2, 20, D)), named
    if ragged:  # the second condition first, in a batch of its own
        batches = [
            ((batch[0][0][k : k + 1], batch[0][1][k : k + 1], batch[0][2][k : k + 1]),
             {name: x[k : k + 1] for name, x in named.items()} | {"condition": torch.tensor([k])})
            for k in (1, 0)
        ]  # fmt: skip
    else:
        batches = [batch]
    got = scored(*batches, conditions=("control", "drug"), **EPSILONS)
    same({k: v for k, v in got.items() if "/" not in k}, {k: (each[0][k] + each[1][k]) / 2 for k in each[0]})
    for k, name in enumerate(("control", "drug")):
        same({key.split("/")[0]: v for key, v in got.items() if key.endswith("/" + name)}, each[k])
    assert not any("/" in key for key in scored(*batches, **EPSILONS))


def test_conditions_may_be_vectors():
    batch = (X.view(2, 30, D), T.view(2, 30, D), Y[:40].view(2, 20, D)), {}
    doses = torch.tensor([[0.5, 1.0], [0.5, 2.0]])
    same(scored((batch[0], {"condition": doses}), **EPSILONS), scored(batch, **EPSILONS))
    with pytest.raises(ValueError, match="conditions names labels, but condition holds vectors"):
        scored((batch[0], {"condition": doses}), conditions=("a", "b"))


def test_rows_of_weight_zero_fill_a_batch_up():
    filled = torch.cat([X, torch.full((5, D), 1e6)])
    weights = torch.cat([torch.full((N,), 1 / N), torch.zeros(5)])
    mapped = torch.cat([T, torch.full((5, D), -1e6)])
    batch = (filled, mapped, Y), {"source_weights": weights}
    same(scored(batch, (((X, T, Y)), {}), **EPSILONS), scored(((X, T, Y), {}), ((X, T, Y), {}), **EPSILONS))


def test_large_sets_are_cut_deterministically_and_said_once(caplog):
    state = torch.get_rng_state()
    metric = MapScores(max_samples=20, **EPSILONS)
    metric.update(X, T, Y, source_weights=A, target_again=AGAIN, true_images=TRUE)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        first = metric.compute()
        metric.update(X, T, Y, source_weights=A, target_again=AGAIN, true_images=TRUE)
        metric.compute()
    assert sum("MapScores takes 20 of up to 60 samples" in record.message for record in caplog.records) == 1
    assert sum("MapScores takes" in record.message for record in caplog.records) == 1
    assert torch.equal(torch.get_rng_state(), state)
    again = MapScores(max_samples=20, **EPSILONS)
    again.update(X, T, Y, source_weights=A, target_again=AGAIN, true_images=TRUE)
    assert all(torch.equal(value, first[name]) for name, value in again.compute().items())
    everything = scored(((X, T, Y), {"source_weights": A, "true_images": TRUE, "target_again": AGAIN}), **EPSILONS)
    for name in ("wasserstein_1", "displacement", "unexplained_variance", "displacement_cosine"):
        assert torch.equal(first[name], everything[name])
    for name in ("sinkhorn_divergence", "energy_distance", "monge_gap"):
        assert not torch.equal(first[name], everything[name])


def test_solves_are_bounded(monkeypatch):
    sizes = []

    def counted(x, y, **options):
        sizes.append((len(x), len(y)))
        return sinkhorn_divergence(x, y, **options)

    monkeypatch.setattr(map_scores, "sinkhorn_divergence", counted)
    scored(((X, T, Y), {"target_again": AGAIN}), max_samples=50)
    assert sizes == [(50, 45), (50, 45)]


def test_the_floor_takes_as_many_samples_as_the_images(caplog):
    got = scored(((X[:30], T[:30], Y), {"target_again": AGAIN}), **EPSILONS)
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:30]
    assert float(got["energy_distance_floor"]) == pytest.approx(float(energy_distance(AGAIN[rows], Y)), rel=1e-5)
    marginal = float(marginal_wasserstein(AGAIN[rows], Y).mean())
    assert float(got["wasserstein_1_floor"]) == pytest.approx(marginal, rel=1e-5)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        scored(((X, T, Y), {"target_again": AGAIN[:9]}))
    assert any("target_again has fewer samples than the source" in record.message for record in caplog.records)


def test_a_better_map_scores_better_and_the_best_is_at_the_floor():
    target = 2 * normal(400, 2) + torch.tensor([3.0, 0.0])
    x, again = normal(400, 2), 2 * normal(400, 2) + torch.tensor([3.0, 0.0])
    good = scored(((x, 2 * x + torch.tensor([3.0, 0.0]), target), {"target_again": again}), convention="debiased")
    bad = scored(((x, x, target), {"target_again": again}), convention="debiased")
    for name in ("sinkhorn_divergence", "energy_distance", "wasserstein_1"):
        assert float(good[name]) < 2 * float(good[f"{name}_floor"]) < 0.3 * float(bad[name])
    assert abs(float(good["monge_gap"])) < 0.05


@pytest.mark.parametrize(
    ("args", "named", "message"),
    [
        ((X, T[:-1], Y), {}, "source has 60 rows but mapped has 59"),
        ((X, T / 0, Y), {}, "mapped holds NaN or infinity in 60 of 60 rows"),
        ((X, T, Y[:, :2]), {}, "source has dimension 3 but target has 2"),
        ((X, T, Y), {"source_weights": 2 * A}, "source_weights must sum to 1, got 2"),
        ((X, T, Y), {"target_again": AGAIN[None]}, r"target_again has shape \(1, 60, 3\) beside source \(60, 3\)"),
        ((X[None], T[None], Y), {}, r"target has shape \(45, 3\) beside source \(1, 60, 3\)"),
        ((X[None], T[None], Y[None].expand(2, -1, -1)), {}, "target has 2 conditions, but source has 1"),
        ((X, T, Y), {"condition": torch.zeros(3)}, r"condition must be \(1,\) labels or \(1, p\) vectors"),
        ((X, T, Y), {"condition": torch.tensor([2])}, "holds the label 2, but there are 2 names"),
        ((X[0], T[0], Y), {}, r"source must have shape \(n, d\)"),
        ((X, T, Y), {"true_images": TRUE}, "true_images came with this batch and not with earlier ones"),
        ((X[:, :2], T[:, :2], Y[:, :2]), {}, "source is torch.float32 of dimension 2, but torch.float32 of 3"),
        ((X.double(), T.double(), Y.double()), {}, "source is torch.float64 of dimension 3"),
    ],
)
def test_bad_batches_are_named_and_change_nothing(args, named, message):
    metric = MapScores(conditions=("a", "b"), **EPSILONS)
    metric.update(X, T, Y)
    before = metric.compute()
    with pytest.raises(ValueError, match=message):
        metric.update(*args, **named)
    metric._computed = None
    same(metric.compute(), before, rel=0, abs=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "fast"}, "solver must be one of"),
        ({"convention": "l2"}, "convention must be one of shannon, kl, debiased"),
        ({"fitting_epsilon": -1.0}, "fitting_epsilon must be a positive finite number"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"conditions": ("a", "a")}, "conditions must be a sequence of names that differ"),
        ({"cost": "euclid"}, "unknown cost"),
    ],
)
def test_options_are_checked_when_the_metric_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        MapScores(**options)


def test_points_are_in_the_domain_of_their_cost():
    with pytest.raises(ValueError, match=r"mapped has .* points off the unit sphere"):
        scored(((X / X.norm(dim=1, keepdim=True), T, Y), {}), cost="geodesic")
    unit = X / X.norm(dim=1, keepdim=True)
    with pytest.raises(ValueError, match=r"target has .* points off the unit sphere"):
        scored(((unit, unit, Y), {}), fitting_cost="geodesic")


# --- processes ----------------------------------------------------------------------------------------------------

CONDITIONED = (X.view(2, 30, D), T.view(2, 30, D), Y[:40].view(2, 20, D))
DDP = {
    "plain": {},
    "weights": {"source_weights": A, "target_weights": B},
    "all": {"true_images": TRUE, "target_again": AGAIN},
}


def _shares(case, rank):
    rows, columns = (slice(0, 35), slice(0, 20)) if rank == 0 else (slice(35, N), slice(20, M))
    named = {}
    for name, value in DDP[case].items():
        part = value[columns if name == "target_weights" else rows]
        named[name] = part / part.sum() if name.endswith("weights") else part
    return (X[rows], T[rows], Y[columns]), named


def _process(rank, port, results):
    enter_world(rank, 2, port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for case in DDP:
        results[rank, case] = {k: float(v) for k, v in scored(_shares(case, rank), **EPSILONS).items()}
    condition = (tuple(x[rank : rank + 1] for x in CONDITIONED), {"condition": torch.tensor([rank])})
    got = scored(condition, conditions=("a", "b"), **EPSILONS)
    results[rank, "conditions"] = {k: float(v) for k, v in got.items()}
    marginal = MarginalWasserstein()
    (x, t, _), _ = _shares("plain", rank)
    marginal.update(x, t)
    results[rank, "marginal"] = marginal.compute().tolist()
    leave_world()


@pytest.mark.distributed
def test_two_processes_are_as_one():
    with mp.Manager() as manager:
        results = manager.dict()
        start_processes(_process, (free_port(), results), 2)
        results = dict(results)
    for case in DDP:
        one = scored(_shares(case, 0), _shares(case, 1), **EPSILONS)
        for rank in range(2):
            same(results[rank, case], one)
    one = scored((CONDITIONED, {}), conditions=("a", "b"), **EPSILONS)
    for rank in range(2):
        same(results[rank, "conditions"], one)
        assert results[rank, "marginal"] == pytest.approx(marginal_wasserstein(X, T).tolist(), rel=1e-5)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_weighted_batch_are_scored_as_the_batch(parts):
    generator = torch.Generator().manual_seed(3)
    source, target = (FiniteSamples(torch.randn(n, 2, generator=generator), torch.rand(n, generator=generator) + 0.1)
                      for n in (20, 31))  # fmt: skip
    every = []
    for replicas in (1, parts):
        scores = MapScores(fitting_epsilon=0.5, gap_epsilon=0.5)
        for rank in range(replicas):
            b = HeldOutBatches(HeldOut([(source, target)], [None]), 100, num_replicas=replicas, rank=rank)[0]
            scores.update(
                b.source, 2 * b.source + 1, b.target, source_weights=b.source_weights,
                target_weights=b.target_weights, parts_of=(20, 31) if replicas > 1 else None,
            )  # fmt: skip
        every.append(scores.compute())
    for name, value in every[0].items():
        torch.testing.assert_close(every[1][name], value, rtol=1e-5, atol=1e-6)


def test_epsilons_that_are_not_given_count_weights_and_leave_outliers_aside():
    counts = [torch.randint(0, 4, (len(x),), generator=torch.Generator().manual_seed(len(x))) for x in (X, Y)]
    weighted = {f"{name}_weights": c / c.sum() for name, c in zip(("source", "target"), counts, strict=True)}
    x, mapped, y = (d.repeat_interleave(c, dim=0) for d, c in ((X, counts[0]), (T, counts[0]), (Y, counts[1])))
    plans = {"convention": "kl"}  # Shannon entropies tell repetitions from weights
    same(scored(((X, T, Y), weighted), **plans), scored(((x, mapped, y), {}), **plans), rel=1e-3, abs=1e-4)
    target = Y.clone()
    target[0] = 1e4
    # The gap sees the target by its epsilon alone.
    expected = scored(((X, T, Y), {}))["monge_gap"]
    assert float(scored(((X, T, target), {}))["monge_gap"]) == pytest.approx(float(expected), rel=0.1)
    shares = [
        typical_share(0.05, SqEuclidean(), [Pool(torch.zeros(1), {"target": y}, None, None)], ("target", "target"))
        for y in (Y, target)
    ]
    assert shares[1] == pytest.approx(shares[0], rel=0.1)
