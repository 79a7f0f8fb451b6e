"""The optimal map between Gaussians."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gap.monge import gaussian_map


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(x: Tensor) -> Tensor:
    return torch.cov(x.T, correction=0)


@pytest.mark.parametrize("d", [1, 2, 8, 32])
def test_it_carries_mean_and_covariance_and_is_the_gradient_of_a_convex_function(d):
    source, target = normal(500, d) @ normal(d, d, seed=1), normal(400, d, seed=2) @ normal(d, d, seed=3) + 7
    A, b = gaussian_map(source.float(), target.float())
    mapped = source @ A.T + b
    torch.testing.assert_close(mapped.mean(0), target.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(covariance(mapped), covariance(target), rtol=1e-4, atol=1e-4)
    assert torch.equal(A, A.T)
    assert float(torch.linalg.eigvalsh(A).min()) >= 0


def test_an_affine_gradient_is_found_again():
    root = normal(4, 4)
    A = root @ root.T
    source = normal(100, 4, seed=1)
    found, b = gaussian_map(source, source @ A + 3)
    torch.testing.assert_close(found, A)
    torch.testing.assert_close(b, torch.full((4,), 3.0, dtype=torch.float64))


def test_features_of_very_different_scales_keep_their_digits():
    scale = torch.tensor([1e-2, 1.0, 1e2], dtype=torch.float64)
    source = normal(200, 3) * scale
    A, _ = gaussian_map(source, 2 * source)
    torch.testing.assert_close(source @ A, 2 * source, rtol=1e-4, atol=0)


def test_constant_features_and_fewer_samples_than_dimensions():
    source = torch.cat([normal(50, 2), torch.full((50, 1), 4.0)], dim=1)
    target = torch.cat([3 * normal(50, 2, seed=1), torch.full((50, 1), -1.0)], dim=1)
    A, b = gaussian_map(source, target)
    mapped = source @ A + b
    torch.testing.assert_close(covariance(mapped), covariance(target))
    torch.testing.assert_close(mapped.mean(0), target.mean(0))
    # The constant feature is translated: what a new sample adds to it is kept.
    torch.testing.assert_close(A[2], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    source, target = normal(10, 64), normal(9, 64, seed=1)
    A, b = gaussian_map(source, target)
    assert A.isfinite().all()
    assert b.isfinite().all()
    torch.testing.assert_close((source @ A + b).mean(0), target.mean(0))


def test_a_target_that_varies_where_the_source_does_not_gets_its_conditional_mean():
    source = torch.cat([normal(2000, 1), torch.zeros(2000, 1)], dim=1)
    root = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    target = normal(2000, 2, seed=1) @ root.T
    A, b = gaussian_map(source, target)
    T = covariance(target)
    # The plan pairs the first coordinates monotonically, and the second given the first is a regression.
    expected = (
        torch.stack([source[:, 0], source[:, 0] * T[0, 1] / T[0, 0]], dim=1)
        * (T[0, 0] / covariance(source)[0, 0]).sqrt()
    )
    torch.testing.assert_close(source @ A + b, expected - expected.mean(0) + target.mean(0))


def test_single_samples_and_point_masses():
    one, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 5.0]])
    A, b = gaussian_map(one, other)
    assert torch.equal(A, torch.eye(2).double())
    assert torch.equal(b, torch.tensor([4.0, 3.0]).double())
    A, b = gaussian_map(normal(10, 2), other.double().expand(3, 2))
    assert torch.equal(A, torch.zeros(2, 2).double())
    assert torch.equal(b, other[0].double())


def test_weights_are_repetitions():
    source, target = normal(6, 2), normal(5, 2, seed=1)
    counts = torch.tensor([1, 2, 0, 3, 1, 1])
    weighted = gaussian_map(source, target, weights=(counts / counts.sum(), None))
    torch.testing.assert_close(
        weighted, gaussian_map(source.repeat_interleave(counts, dim=0), target), rtol=1e-6, atol=1e-6
    )


def test_shrinkage():
    source, target = normal(30, 3) * torch.tensor([1.0, 2.0, 3.0]), normal(30, 3, seed=1) @ normal(3, 3, seed=2) + 1
    A, _ = gaussian_map(source, target, shrinkage=1)
    ratio = (covariance(target).trace() / covariance(source).trace()).sqrt()
    torch.testing.assert_close(A, ratio * torch.eye(3).double())
    # The oracle's share, as the paper writes it.
    shrunk = []
    for x in (source, target):
        S, (n, d) = np.cov(np.asarray(x).T, bias=True), x.shape
        trace, of_square = np.trace(S), np.trace(S @ S)
        share = ((1 - 2 / d) * of_square + trace**2) / ((n + 1 - 2 / d) * (of_square - trace**2 / d))
        shrunk.append(torch.from_numpy((1 - share) * S + share * trace / d * np.eye(d)))
        assert 0 < share < 1
    A, _ = gaussian_map(source, target, shrinkage="auto")
    torch.testing.assert_close(A @ shrunk[0] @ A, shrunk[1])
    A, _ = gaussian_map(normal(5, 100), normal(5, 100, seed=1), shrinkage="auto")
    assert float(torch.linalg.eigvalsh(A).min()) > 0.1


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "ledoit", None, float("nan")])
def test_bad_shrinkage_is_refused(value):
    with pytest.raises(ValueError, match="shrinkage must be a number from 0 to 1 or 'auto'"):
        gaussian_map(normal(5, 2), normal(5, 2), shrinkage=value)


def test_bad_samples_and_weights_are_refused():
    with pytest.raises(ValueError, match="source has dimension 2 but target has 3"):
        gaussian_map(normal(5, 2), normal(5, 3))
    with pytest.raises(ValueError, match="the weights of target must sum to 1"):
        gaussian_map(normal(5, 2), normal(5, 2), weights=(None, torch.ones(5)))
