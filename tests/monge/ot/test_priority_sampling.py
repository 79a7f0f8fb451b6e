"""A few samples that stand for many, whatever their order."""

import pytest
import torch

from lightning_gap.monge.ot.priority_sampling import priority_sample


def draws(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def rows(points: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in points.tolist()}


def test_few_samples_are_returned_as_they_are():
    points, weights = draws(50, 2), torch.rand(50)
    assert priority_sample(points, weights, 50) == (points, weights)


def in_order(points: torch.Tensor) -> torch.Tensor:
    return points[points[:, 0].argsort()]


@pytest.mark.parametrize("d", [1, 3, 40])
def test_the_choice_depends_neither_on_the_order_nor_on_the_precision_nor_on_global_randomness(d):
    points = draws(700, d)
    state = torch.get_rng_state()
    chosen = in_order(priority_sample(points, None, 100)[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert len(chosen) == 100
    # Any of samples that all but coincide stands for all of them.
    torch.testing.assert_close(in_order(priority_sample(points.flip(0), None, 100)[0]), chosen, rtol=0, atol=4e-3)
    torch.testing.assert_close(in_order(priority_sample(points.double(), None, 100)[0].float()), chosen)


@pytest.mark.parametrize("row", [0, 123, 699])
def test_another_sample_in_the_place_of_one_changes_at_most_one(row):
    points = draws(700, 3)
    moved = points.clone()
    moved[row] = 1e4
    before, after = (rows(priority_sample(x, None, 100)[0]) for x in (points, moved))
    assert len(before - after) <= 1


def test_sums_are_estimated_without_bias():
    weights = torch.rand(2000, generator=torch.Generator().manual_seed(1)) ** 3
    errors = []
    for seed in range(20):
        points = draws(2000, 2, seed)
        few, w = priority_sample(points, weights, 400)
        mean = (weights[:, None] * points.square()).sum(0) / weights.sum()
        errors.append((w[:, None] * few.square()).sum(0) / w.sum() / mean - 1)
    errors = torch.stack(errors)
    assert float(errors.std()) < 0.15
    assert float(errors.mean().abs()) < 3 * float(errors.std()) / errors.numel() ** 0.5


def test_samples_that_coincide_count_together():
    points = torch.tensor([[0.0, 1.0], [2.0, -3.0], [5.0, 5.0]]).repeat_interleave(torch.tensor([300, 500, 200]), 0)
    few, weights = priority_sample(points, None, 64)
    assert {tuple(p): float(w) for p, w in zip(few.tolist(), weights, strict=True)} == {
        (0.0, 1.0): 300.0, (2.0, -3.0): 500.0, (5.0, 5.0): 200.0,
    }  # fmt: skip


def test_zeros_are_samples_too():
    few, weights = priority_sample(torch.zeros(300, 4), None, 10)
    assert few.shape == (1, 4)
    assert float(weights) == 300
