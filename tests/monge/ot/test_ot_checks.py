"""Checks of samples, weights and epsilons."""

import numpy as np
import pytest
import torch

from lightning_gap.monge.ot.checks import check_epsilon, check_pair, check_samples, check_weights

GOOD = torch.ones(4, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_samples_pass(dtype):
    check_samples("x", torch.ones(3, 2, dtype=dtype, requires_grad=True))


def test_samples_whose_sum_overflows_pass():
    check_samples("x", torch.full((3, 2), 1.7e308, dtype=torch.float64))


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        (np.ones((3, 2)), TypeError, r"x must be a tensor, got ndarray: use torch.as_tensor\(x\)"),
        ([[1.0]], TypeError, "x must be a tensor, got list"),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, r"floating-point dtype, got torch.int64: use x.float\(\)"),
        (torch.ones(3, 2, dtype=torch.complex64), TypeError, "floating-point dtype, got torch.complex64"),
        (torch.ones(3), ValueError, r"shape \(n, d\), got \(3,\): add the missing dimension"),
        (torch.ones(3, 2, 2), ValueError, r"shape \(n, d\), got \(3, 2, 2\): flatten"),
        (torch.ones(0, 2), ValueError, r"x is empty, with shape \(0, 2\)"),
        (torch.ones(3, 0), ValueError, r"x is empty, with shape \(3, 0\)"),
    ],
)
def test_what_is_no_sample_is_refused(samples, error, message):
    with pytest.raises(error, match=message):
        check_samples("x", samples)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_named(value):
    x = torch.ones(10, 2)
    x[3, 1] = x[7, 0] = value
    with pytest.raises(ValueError, match=r"mapped holds NaN or infinity in 2 of 10 rows \(3, 7\): remove"):
        check_samples("mapped", x)
    x[:] = value
    with pytest.raises(ValueError, match=r"10 of 10 rows \(0, 1, 2, 3, 4, \.\.\.\)"):
        check_samples("x", x)


def test_infinities_that_cancel_are_found():
    x = torch.tensor([[float("inf")], [-float("inf")]])
    with pytest.raises(ValueError, match=r"2 of 2 rows \(0, 1\)"):
        check_samples("x", x)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.ones(4, 3), ValueError, "x has dimension 2 but y has 3"),
        (torch.ones(5, 2), ValueError, "x has 4 rows but y has 5: they are paired"),
        (torch.ones(4, 2).double(), TypeError, r"x is torch.float32 but y is torch.float64: convert one"),
        (torch.ones(4, 2, device="meta"), ValueError, "x is on cpu but y on meta"),
    ],
)
def test_samples_that_do_not_fit_each_other_are_refused(y, error, message):
    with pytest.raises(error, match=message):
        check_pair("x", GOOD, "y", y, same_length=True)


def test_sets_of_different_size_pass_where_they_are_not_paired():
    check_pair("x", GOOD, "y", torch.ones(5, 2))


def test_weights_are_uniform_by_default():
    assert torch.equal(check_weights("w", None, GOOD.double()), torch.full((4,), 0.25, dtype=torch.float64))


def test_weights_take_the_dtype_of_the_samples():
    w = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    assert torch.equal(check_weights("w", w, GOOD), w.float())


def test_weights_are_rescaled_where_they_sum_to_one_but_for_rounding():
    w = torch.full((4,), 0.2501, dtype=torch.float64, requires_grad=True)
    got = check_weights("w", w, GOOD.double())
    assert got.sum().item() == pytest.approx(1, abs=1e-15)
    assert got.requires_grad


def test_unbalanced_weights_keep_their_mass():
    assert check_weights("w", torch.full((4,), 3.0), GOOD, balanced=False).sum() == 12


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([0.25] * 4, TypeError, "weights must be a tensor or None, got list"),
        (torch.ones(3) / 3, ValueError, r"weights must have shape \(4,\), one weight a sample, got \(3,\)"),
        (torch.ones(4, 1) / 4, ValueError, r"got \(4, 1\)"),
        (torch.tensor([0.5, 0.7, -0.2, 0.0]), ValueError, "got -0.2.* in row 2"),
        (torch.tensor([0.5, float("nan"), 0.2, 0.0]), ValueError, "got nan in row 1"),
        (torch.tensor([0.5, 0.5, 0.0, float("inf")]), ValueError, "got inf in row 3"),
        (torch.ones(4), ValueError, "weights must sum to 1, got 4: divide it by its sum"),
        (torch.zeros(4), ValueError, "weights must not all be 0"),
    ],
)
def test_bad_weights_are_refused(weights, error, message):
    with pytest.raises(error, match=message):
        check_weights("weights", weights, GOOD)


@pytest.mark.parametrize("epsilon", [0.5, 1, np.float32(0.5), np.int64(2), torch.tensor(0.5), torch.tensor([0.5])])
def test_positive_numbers_are_epsilons(epsilon):
    got = check_epsilon("epsilon", epsilon)
    assert type(got) is float
    assert got == float(epsilon)


def test_no_epsilon_is_none():
    assert check_epsilon("epsilon", None) is None


@pytest.mark.parametrize("epsilon", [0, -1.0, float("nan"), float("inf"), True, "0.1", [0.1], torch.ones(2)], ids=repr)
def test_bad_epsilons_are_refused(epsilon):
    with pytest.raises(ValueError, match="reach must be a positive finite number, got"):
        check_epsilon("reach", epsilon)
