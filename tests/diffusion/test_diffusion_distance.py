import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gap.diffusion import (
    estimate_alpha,
    fit_diffusion,
    tracked_parameters,
    weight_displacement,
    weight_norm,
)
from lightning_gap.diffusion.distance import displacement_from_squares, square_sums


def displacement_reference(weights, anchor):
    """All weights in one float64 vector."""
    w = torch.cat([x.detach().double().flatten() for x in weights.values()])
    a = torch.cat([x.detach().double().flatten() for x in anchor.values()])
    d = (w - a).norm()
    return d.item(), (d / a.norm()).item(), w.norm().item(), (w @ a / (w.norm() * a.norm())).item()


def moved(shapes, dtype, scale=1e-2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    anchor = {f"p{i}": draw(shape) for i, shape in enumerate(shapes)}
    weights = {name: (a + scale * draw(a.shape)).to(dtype) for name, a in anchor.items()}
    return weights, {name: a.to(dtype) for name, a in anchor.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@settings(deadline=None, max_examples=15)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=4).map(tuple), min_size=1, max_size=5),
    scale=st.sampled_from([1e-4, 1e-2, 1.0]),
    piece=st.sampled_from([1, 7, 1 << 18]),
)
def test_displacement_equals_float64_reference(dtype, shapes, scale, piece):
    weights, anchor = moved(shapes, dtype, scale)
    expected = displacement_reference(weights, anchor)
    distance2, norm2 = square_sums(weights, anchor, cpu_piece=piece).sum(0).tolist()
    measured = displacement_from_squares(distance2, norm2, weight_norm(anchor))
    assert measured[:3] == pytest.approx(expected[:3], rel=1e-6)
    assert measured.cosine == pytest.approx(expected[3], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_millions_of_weights_keep_six_digits(dtype):
    weights, anchor = moved([(2000, 2000)], dtype)
    expected = displacement_reference(weights, anchor)
    assert weight_displacement(weights, anchor)[:3] == pytest.approx(expected[:3], rel=1e-6)


def test_memory_layout_does_not_matter():
    weights, anchor = moved([(8, 3, 5, 5), (6, 4)], torch.float32)
    strange = {"p0": weights["p0"].contiguous(memory_format=torch.channels_last), "p1": weights["p1"].t().clone().t()}
    assert tuple(weight_displacement(strange, anchor)) == pytest.approx(
        displacement_reference(weights, anchor), rel=1e-6
    )


def test_complex_weights():
    anchor = {"z": torch.tensor([3 + 4j, 0])}
    weights = {"z": torch.tensor([0j, 12j])}
    assert weight_displacement(weights, anchor) == (13.0, 2.6, 12.0, 0.0)


def test_known_anchor_norm_changes_nothing():
    weights, anchor = moved([(50, 3)], torch.float32)
    given_norm = weight_displacement(weights, anchor, anchor_norm=weight_norm(anchor))
    assert given_norm == weight_displacement(weights, anchor)


def test_zero_and_diverged_weights():
    zero, one = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    start = weight_displacement(one, zero)
    assert start.distance == pytest.approx(math.sqrt(3))
    assert math.isnan(start.relative_distance)
    assert math.isnan(start.cosine)
    assert math.isnan(weight_displacement({"w": torch.tensor([1.0, math.nan, 0.0])}, one).distance)
    diverged = weight_displacement({"w": torch.tensor([1.0, math.inf, 0.0])}, one)
    assert diverged.distance == math.inf
    assert math.isnan(diverged.cosine)


def test_names_and_shapes_must_agree():
    with pytest.raises(ValueError, match=r"same names.*: b"):
        weight_displacement({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"same shapes.*a"):
        weight_displacement({"a": torch.ones(2)}, {"a": torch.ones(1)})


def test_tied_parameters_once_and_frozen_ones_not():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "norm": nn.BatchNorm1d(3)})
    model["head"].weight = model["embed"].weight
    model["norm"].requires_grad_(False)
    assert set(tracked_parameters(model)) == {"embed.weight", "head.bias"}
    assert not any(p.requires_grad for p in tracked_parameters(model).values())
    assert tracked_parameters(model)["embed.weight"].data_ptr() == model["embed"].weight.data_ptr()


def test_another_default_device_changes_nothing():
    # Under torch.set_default_device("cuda") what is drawn or counted on the CPU stays there; "meta" shows that here.
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 1))
    start = {name: tensor.clone() for name, tensor in tracked_parameters(model).items()}
    weights = {name: tensor + 0.1 for name, tensor in start.items()}
    t = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
    d = [0.1 + math.log(x) for x in t]

    def everything():
        fit = fit_diffusion(t, d)
        landscape = estimate_alpha(model, lambda m: m[0].weight.sum() + m[1].weight.sum(), radius=1.0, samples=60)
        numbers = weight_displacement(weights, start), landscape.losses, landscape.distances, fit.numbers()
        return numbers, fit.log_law(t).tolist(), fit.power_law(t).tolist()

    expected = everything()
    with torch.device("meta"):
        assert repr(everything()) == repr(expected)
