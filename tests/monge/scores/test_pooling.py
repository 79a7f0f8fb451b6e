"""Weights of the single metrics, and how batches of them count."""

import pytest
import torch
from scored_samples import TRUE, A, B, T, X, Y

from lightning_gap.monge import (
    DisplacementCosine,
    EnergyDistance,
    MarginalWasserstein,
    MongeGap,
    SinkhornDivergence,
    UnexplainedVariance,
)

WEIGHTED = {
    "gap": (MongeGap("euclidean", epsilon=0.2), (X, T), A),
    "divergence": (SinkhornDivergence(epsilon=0.5), (X, Y), (A, B)),
    "energy": (EnergyDistance(), (X, Y), (A, B)),
    "marginals": (MarginalWasserstein(), (X, Y), (A, B)),
    "variance": (UnexplainedVariance(), (T, TRUE), A),
    "cosine": (DisplacementCosine(), (X, T, TRUE), A),
}


@pytest.mark.parametrize("case", WEIGHTED)
def test_integer_weights_are_repetitions(case):
    metric, data, weights = WEIGHTED[case]
    counts = [torch.randint(0, 4, (len(d),), generator=torch.Generator().manual_seed(len(d))) for d in data]
    single = isinstance(weights, torch.Tensor)
    w = [c / c.sum() for c in counts]
    weighted, repeated, plain = metric.clone(), metric.clone(), metric.clone()
    weighted.update(*data, weights=w[0] if single else (w[0], w[1]))
    repeated.update(*(d.repeat_interleave(c, dim=0) for d, c in zip(data, counts, strict=True)))
    plain.update(*data)
    if case == "gap":  # the Shannon entropy knows of repetitions
        weighted.convention = repeated.convention = "kl"
    torch.testing.assert_close(weighted.compute(), repeated.compute(), rtol=2e-3, atol=1e-4)
    assert (weighted.compute() - plain.compute()).abs().max() > 1e-5


@pytest.mark.parametrize("case", WEIGHTED)
def test_weighted_batches_count_by_their_samples(case):
    metric, data, weights = WEIGHTED[case]
    single = isinstance(weights, torch.Tensor)
    pooled_weights, parts = [], []
    for w in [weights] if single else weights:
        first, second = w[:20], w[20:]
        parts.append((first / first.sum(), second / second.sum()))
        counts = [(part > 0).sum() for part in (first, second)]
        pooled_weights.append(torch.cat([p * c for p, c in zip(parts[-1], counts, strict=True)]) / sum(counts))
    whole, batches = metric.clone(), metric.clone()
    whole.update(*data, weights=pooled_weights[0] if single else tuple(pooled_weights))
    for k, rows in enumerate((slice(0, 20), slice(20, None))):
        w = [part[k] for part in parts]
        batches.update(*(d[rows] for d in data), weights=w[0] if single else tuple(w))
    torch.testing.assert_close(batches.compute(), whole.compute(), rtol=1e-4, atol=1e-5)
