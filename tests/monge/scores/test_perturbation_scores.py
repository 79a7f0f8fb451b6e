"""The five scores of perturbations: their definitions, closed forms, weights and floors, and how a test logs them."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from benchmarks.science.pertpy_distances import made_sets
from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import PerturbationScores, PerturbationScoring, sinkhorn_divergence
from lightning_gap.monge.scores import (
    DrugSignature,
    FeatureMeansR2,
    MaximumMeanDiscrepancy,
    drug_signature,
    entropic_wasserstein,
    feature_means_r2,
    maximum_mean_discrepancy,
)

GAMMAS = (2, 1, 0.5, 0.1, 0.01, 0.005)


def draws(seed, n=40, m=30, d=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, d, generator=generator, dtype=dtype) for k in (n, m))
    a, b = (torch.rand(k, generator=generator, dtype=dtype) for k in (n, m))
    return x, 0.7 * y + 0.4, a / a.sum(), b / b.sum()


def kernel(x, y, gamma):
    return np.exp(-gamma * ((x[:, None] - y[None]) ** 2).sum(-1))


def twin_of_mmd(x, y, a, b):
    parts = [
        a @ kernel(x, x, gamma) @ a + b @ kernel(y, y, gamma) @ b - 2 * a @ kernel(x, y, gamma) @ b for gamma in GAMMAS
    ]
    return np.mean(parts)


def twin_of_wasserstein(x, y, a, b, epsilon=0.1):
    """Sinkhorn's iterations in the log domain, and the primal value."""
    cost = np.linalg.norm(x[:, None] - y[None], axis=-1)
    f, g = np.zeros(len(x)), np.zeros(len(y))
    for _ in range(3000):
        f = -epsilon * np.log(np.exp((g - cost) / epsilon) @ b)
        g = -epsilon * np.log(a @ np.exp((f[:, None] - cost) / epsilon))
    plan = a[:, None] * b * np.exp((f[:, None] + g - cost) / epsilon)
    return (plan * cost).sum() + epsilon * (plan * np.log(plan / (a[:, None] * b))).sum()


def uniform(n):
    return np.full(n, 1 / n)


# Of two sets by a formula, by the code of the conditional Monge gap (cmonge 0.1.3, in double precision).
PUBLISHED = {
    "r2": (0.8392297013510154, 0.9843950710506465),
    "drug_signature": (1.477057412757574, 15.893287804045523),
    "mmd": (0.10758997244991936, 0.09824833445982527),
    "wasserstein": (2.0079952634710696, 19.774751690541446),
    "sinkhorn_divergence": (1.653650874481978, 19.420247848752698),
}


@pytest.mark.parametrize("place", [0, 1])
def test_values_are_those_of_the_conditional_monge_gap(place):
    x, y = map(torch.tensor, list(made_sets().values())[place])
    scores = PerturbationScores()
    scores.update(x, x, y)
    found = scores.compute()
    for name, values in PUBLISHED.items():
        # Its solver stops at a marginal error of 1e-3.
        assert float(found[name]) == pytest.approx(values[place], rel=1e-6), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighted", [False, True])
def test_each_is_its_definition(seed, weighted):
    x, y, a, b = draws(seed)
    weights = (a, b) if weighted else (None, None)
    p, q = (w.numpy() for w in (a, b)) if weighted else (uniform(len(x)), uniform(len(y)))
    means = p @ x.numpy(), q @ y.numpy()
    assert float(feature_means_r2(x, y, weights=weights)) == pytest.approx(np.corrcoef(*means)[0, 1] ** 2)
    assert float(drug_signature(x, y, weights=weights)) == pytest.approx(np.linalg.norm(means[0] - means[1]))
    assert float(maximum_mean_discrepancy(x, y, weights=weights)) == pytest.approx(
        twin_of_mmd(x.numpy(), y.numpy(), p, q)
    )
    found = entropic_wasserstein(x, y, weights=weights, tolerance=1e-8)
    assert float(found) == pytest.approx(twin_of_wasserstein(x.numpy(), y.numpy(), p, q), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.005, 0.1, 1.0])
def test_the_discrepancy_of_gaussians(gamma):
    """E exp(-γ |X - Y|²) of X - Y ~ N(m, s² I) is (1 + 2 γ s²)^(-d/2) exp(-γ |m|² / (1 + 2 γ s²))."""
    d, shift, generator = 2, torch.tensor([0.5, -1.0]), torch.Generator().manual_seed(0)
    x, y = (torch.randn(3000, d, generator=generator) for _ in range(2))
    y = 2 * y + shift

    def mean(m, s2):
        return (1 + 2 * gamma * s2) ** (-d / 2) * np.exp(-gamma * m / (1 + 2 * gamma * s2))

    expected = mean(0.0, 2) + mean(0.0, 8) - 2 * mean(1.25, 5)
    assert float(maximum_mean_discrepancy(x, y, gammas=[gamma])) == pytest.approx(expected, abs=0.01)


def test_points_and_equal_sets():
    x, y = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    assert float(drug_signature(x, y)) == pytest.approx(5)
    assert float(entropic_wasserstein(x, y)) == pytest.approx(5)
    assert float(maximum_mean_discrepancy(x, y, gammas=[0.01])) == pytest.approx(2 - 2 * np.exp(-0.25))
    x = draws(0)[0]
    assert float(maximum_mean_discrepancy(x, x)) == pytest.approx(0, abs=1e-12)
    assert float(feature_means_r2(x, 3 * x + 1)) == pytest.approx(1)
    # Not debiased: what entropy costs between equal sets.
    assert float(entropic_wasserstein(x, x)) > 0
    assert feature_means_r2(x[:, :1], x[:, :1]).isnan()


def test_weights_of_batches_count_by_their_samples():
    x, y, a, b = draws(1)
    for metric, function in ((FeatureMeansR2(), feature_means_r2), (DrugSignature(), drug_signature)):
        metric.update(x, y, weights=(a, b))
        torch.testing.assert_close(metric.compute(), function(x, y, weights=(a, b)))
        with pytest.raises(ValueError, match="x has dimension 2, but 3 in earlier updates"):
            metric.update(x[:, :2], y[:, :2])


@pytest.mark.parametrize(
    ("gammas", "message"), [([], "gammas is empty"), ([1.0, 0.0], "gammas must be a positive finite number")]
)
def test_gammas_that_make_no_kernel_are_refused(gammas, message):
    for use in (lambda: MaximumMeanDiscrepancy(gammas), lambda: maximum_mean_discrepancy(*draws(0)[:2], gammas=gammas)):
        with pytest.raises(ValueError, match=message):
            use()


def five(x, y):
    return {
        "r2": feature_means_r2(x, y),
        "drug_signature": drug_signature(x, y),
        "mmd": maximum_mean_discrepancy(x, y),
        "wasserstein": entropic_wasserstein(x, y),
        "sinkhorn_divergence": sinkhorn_divergence(x, y, cost="euclidean", epsilon=0.1, tolerance=1e-3),
    }


@pytest.mark.parametrize("with_again", [False, True])
def test_all_five_of_each_condition_beside_their_floors(with_again):
    x, y = torch.randn(2, 20, 3), torch.randn(2, 16, 3)
    again = torch.randn(2, 16, 3) if with_again else None
    scores = PerturbationScores(conditions=["A", "B"])
    for k in range(2):  # one condition at a time, as in a test
        scores.update(
            x[k : k + 1], x[k : k + 1] + 1, y[k : k + 1], condition=torch.tensor([k]),
            target_again=None if again is None else again[k : k + 1],
        )  # fmt: skip
    values = scores.compute()
    for k, name in enumerate("AB"):
        floor = (again[k], y[k]) if again is not None else (y[k, ::2], y[k, 1::2])
        for suffix, pair in (("", (x[k] + 1, y[k])), ("_floor", floor)):
            for score, expected in five(*pair).items():
                torch.testing.assert_close(values[f"{score}{suffix}/{name}"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["mmd"], (values["mmd/A"] + values["mmd/B"]) / 2)
    assert len(values) == 3 * 10


@pytest.mark.parametrize("raw", [False, True])
def test_a_test_logs_them_by_condition(raw):
    x, y = torch.randn(100, 2), torch.randn(120, 2) * 3
    labels = {"drug": np.repeat(["A", "B", "C"], 40), "dose": np.tile(np.repeat([1, 10], 20), 3)}
    data = SamplesDataModule(x, y, conditions=(None, labels), batch_size=8, test_conditions=["C"], standardize=True)
    scoring, model = PerturbationScoring(raw=raw), MongeMap(hidden=(8,))
    trainer = Trainer(
        max_steps=2, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[scoring],
    )  # fmt: skip
    trainer.fit(model, data)
    before = torch.get_rng_state()
    (logged,) = trainer.test(model, data, verbose=False)
    assert torch.equal(torch.get_rng_state(), before)
    decode = data.representation.decode if raw else torch.nn.Identity()
    batches = dict(zip(("C, 1", "C, 10"), data.test_dataloader(), strict=True))
    for name, batch in batches.items():
        mapped = model(batch.source[0], batch.condition.expand(len(batch.source[0]), -1)).detach()
        for score, expected in five(decode(mapped), decode(batch.target[0])).items():
            found = logged[f"lightning_gap/monge/test_perturbation_{score}/{name}"]
            assert found == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
            assert scoring.values[f"{score}/{name}"] == pytest.approx(found, rel=1e-6)
        again = five(decode(batch.target_again[0]), decode(batch.target[0]))
        assert scoring.values[f"mmd_floor/{name}"] == pytest.approx(float(again["mmd"]), rel=1e-3)
    assert {name.rpartition("/")[2] for name in scoring.values if "/" in name} == {"C, 1", "C, 10"}


def test_labels_have_their_names_too():
    x, y, names = torch.randn(60, 2), torch.randn(60, 2), ["B", "T"] * 30
    data = SamplesDataModule(x, y, conditions=(names, names), batch_size=8, test_fraction=0.3)
    scoring, model = PerturbationScoring(), MongeMap(hidden=(8,))
    trainer = Trainer(
        max_steps=1, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[scoring],
    )  # fmt: skip
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert {"mmd/B", "mmd/T", "mmd_floor/B", "mmd"} <= set(scoring.values)
