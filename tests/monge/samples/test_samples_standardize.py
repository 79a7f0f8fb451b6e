"""The affine representation: standardized features and principal components."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gap.monge import AffineRepresentation
from lightning_gap.monge.samples.standardize import moments, principal_components


def correlated(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=g, dtype=torch.float64) * torch.logspace(0, -1, d, dtype=torch.float64)
    return (torch.randn(n, d, generator=g, dtype=torch.float64) @ mixing.mT + 3).to(dtype)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(2, 40), d=st.integers(1, 8), standardize=st.booleans(), seed=st.integers(0, 99), data=st.data())
def test_decode_inverts_encode_on_the_components(n, d, standardize, seed, data):
    x = correlated(n, d, seed)
    k = data.draw(st.none() | st.integers(1, min(d, n - 1)))
    found = AffineRepresentation.fit(x, standardize=standardize, components=k)
    z = found.encode(x)
    assert z.shape == (n, d if k is None else k)
    torch.testing.assert_close(found.encode(found.decode(z)), z)
    if k is None or k == d:
        torch.testing.assert_close(found.decode(z), x)


def test_standardized_features_have_mean_zero_and_deviation_one():
    z = AffineRepresentation.fit(correlated(50, 4), standardize=True).encode(correlated(50, 4))
    torch.testing.assert_close(z.mean(0), torch.zeros(4, dtype=z.dtype), atol=1e-12, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(4, dtype=z.dtype))


@pytest.mark.parametrize("shape", [(60, 7), (9, 30)], ids=["many samples", "many features"])
@pytest.mark.parametrize("path", ["dense", "lanczos"])
def test_components_are_those_of_the_singular_value_decomposition(shape, path):
    x = correlated(*shape)
    if path == "lanczos":
        k = 1
        mean, scale = moments(x)
        found = principal_components(x, mean, torch.ones_like(scale), k, dense=1, block=64)
    else:
        k = 4
        found = AffineRepresentation.fit(x, components=k).components
    expected = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:k]
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(k, dtype=x.dtype), rtol=1e-9, atol=0)
    assert bool((found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all())


def test_a_constant_feature_keeps_its_scale():
    x = correlated(30, 3)
    x[:, 1] = 0.1
    found = AffineRepresentation.fit(x, standardize=True)
    assert found.scale[1] == 1
    assert not found.encode(x)[:, 1].abs().max() > 1e-12
    assert AffineRepresentation.fit(torch.ones(1, 2), standardize=True).scale.tolist() == [1, 1]


def test_a_large_mean_takes_no_digits_away():
    x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).double() + 1e7
    found = AffineRepresentation.fit(x, standardize=True)
    assert abs(float(found.scale) - float((x - 1e7).std(correction=0))) < 1e-6


def test_hyperparameters_and_state_rebuild_it():
    x = correlated(30, 4, dtype=torch.float32)
    found = AffineRepresentation.fit(x, standardize=True, components=2)
    again = AffineRepresentation(**found.hparams)
    again.load_state_dict(found.state_dict())
    assert torch.equal(again.encode(x), found.encode(x))
    assert found.hparams == {"dim": 4, "components": 2}
    assert AffineRepresentation(3).hparams == {"dim": 3, "components": None}


def test_encode_keeps_the_higher_precision_and_leading_dimensions():
    found = AffineRepresentation.fit(correlated(30, 4, dtype=torch.float32), components=2)
    assert found.encode(torch.zeros(5, 6, 4, dtype=torch.float64)).shape == (5, 6, 2)
    assert found.encode(torch.zeros(3, 4, dtype=torch.float64)).dtype == torch.float64
    assert found.encode(torch.zeros(3, 4, dtype=torch.bfloat16)).dtype == torch.float32
    assert found.decode(torch.zeros(2)).shape == (4,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AffineRepresentation(0), "dim must be at least 1"),
        (lambda: AffineRepresentation(2, 3), "components=3 is more than the 2 features"),
        (lambda: AffineRepresentation.fit(torch.zeros(5, 2), components=1), "vary in 0 directions only"),
        (
            lambda: AffineRepresentation.fit(torch.randn(5, 2) @ torch.ones(2, 3), components=2),
            "components=2, but the 5 training samples vary in 1 directions only: use components <= 1",
        ),
        (lambda: AffineRepresentation(2).encode(torch.zeros(4, 3)), r"must have dimension 2, got shape \(4, 3\)"),
        (lambda: AffineRepresentation.fit(torch.full((2, 2), torch.nan)), "samples holds NaN"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
