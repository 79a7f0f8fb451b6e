"""Affine terms by label: each its own, near the shared one where samples are few, and as an older state has them."""

import pytest
import torch
from torch import Tensor

from lightning_gap.monge import ConditionalMap, StartPair, StructuredMap, gaussian_map
from lightning_gap.monge.maps.affine import affine_of_labels, affinely


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_labels(*sizes: int) -> list[StartPair]:
    scales = (0.5, 3.0, 1.0)
    return [
        StartPair(normal(n, 2, seed=k), scales[k] * normal(n, 2, seed=10 + k) + 4 * k, torch.tensor(k))
        for k, n in enumerate(sizes)
    ]


def together(pairs: list[StartPair]) -> tuple[Tensor, Tensor]:
    return torch.cat([p.source for p in pairs]), torch.cat([p.target for p in pairs])


@pytest.mark.parametrize("make", [ConditionalMap, lambda d, **kinds: StructuredMap(d, "sqeuclidean", **kinds)])
@pytest.mark.parametrize("start", ["mean", "gaussian"])
def test_each_label_starts_at_a_map_of_its_own(make, start):
    pairs = of_labels(2000, 2000)
    net = make(2, hidden=(4,), start=start, num_conditions=3)
    net.start(*together(pairs), pairs=pairs)
    for k, pair in enumerate(pairs):
        images = net(pair.source, torch.full((2000,), k)).detach()
        torch.testing.assert_close(images.mean(0), pair.target.mean(0), rtol=1e-3, atol=1e-3)
        if start == "gaussian":
            torch.testing.assert_close(images.std(0), pair.target.std(0), rtol=2e-2, atol=2e-2)
    # A label without samples starts where all do.
    images = net(together(pairs)[0], torch.full((4000,), 2)).detach()
    torch.testing.assert_close(images.mean(0), together(pairs)[1].mean(0), rtol=1e-3, atol=1e-3)


def test_a_matrix_of_few_samples_is_near_the_shared_one_and_its_mean_is_its_own():
    pairs = of_labels(1000, 4)
    (many, _), (few, offset) = affine_of_labels("gaussian", pairs, 2, gaussian_map(*together(pairs)))
    alone = gaussian_map(pairs[1].source, pairs[1].target, shrinkage="auto")[0]
    assert float((few - many).norm()) < float((alone - many).norm())
    mean = few @ pairs[1].source.double().mean(0) + offset
    torch.testing.assert_close(mean, pairs[1].target.double().mean(0))
    assert torch.allclose(many, gaussian_map(pairs[0].source, pairs[0].target)[0], atol=5e-3)


def test_weights_count():
    pair = of_labels(100)[0]
    w = torch.cat([torch.full((50,), 0.02), torch.zeros(50)])
    weighted = [pair._replace(source_weights=w, target_weights=w)]
    half = [pair._replace(source=pair.source[:50], target=pair.target[:50])]
    pooled = gaussian_map(pair.source, pair.target)
    (A, b), (A_half, b_half) = (affine_of_labels("gaussian", some, 1, pooled)[0] for some in (weighted, half))
    torch.testing.assert_close(A, A_half, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b, b_half, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_matrix", [True, False])
def test_label_by_label_is_as_all_at_once(with_matrix):
    x, label, offset = normal(2, 6, 3), torch.arange(12).view(2, 6) % 4, normal(4, 3, seed=1)
    matrix = normal(4, 3, 3, seed=2) if with_matrix else None
    moved = (matrix[label] @ x[..., None])[..., 0] if with_matrix else 0
    torch.testing.assert_close(affinely(x, matrix, offset, label), moved + offset[label])
    assert affinely(x[:0], matrix, offset, label[:0]).shape == (0, 6, 3)


def test_an_older_state_gives_all_labels_the_same_term():
    net = ConditionalMap(2, (4,), start="gaussian", num_conditions=3)
    state = net.state_dict()
    state["matrix"], state["offset"] = 2 * torch.eye(2), torch.tensor([1.0, 3.0])
    net.load_state_dict(state)
    x = normal(3, 2)
    torch.testing.assert_close(net(x, torch.arange(3)), 2 * x + torch.tensor([1.0, 3.0]))
