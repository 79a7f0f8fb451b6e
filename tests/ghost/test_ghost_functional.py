import copy

import pytest
import torch
from ghost_reference import SPATIAL, G, as_format, make, members, one_after_another, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_gap.ghost import (
    GhostBatchNorm1d,
    convert_ghost_batchnorm,
    ghost_batch_norm,
    ghost_slices,
)


def compare(plain, x, *, g=G, steps=2, memory_format="contiguous", tolerance=1e-12, **kwargs):
    """Outputs, gradients and running statistics of the ghost layer against the twin, over several steps."""
    ghost = convert_ghost_batchnorm(copy.deepcopy(plain), g, **kwargs)
    assert isinstance(ghost, type(plain))
    for step in range(steps):
        mine = as_format((x + step).detach(), memory_format).requires_grad_()
        twin = (x + step).detach().requires_grad_()
        y, expected = ghost(mine), one_after_another(plain, twin, g, **kwargs)
        upstream = torch.randn_like(expected)
        y.backward(upstream)
        expected.backward(upstream)
        assert y.dtype == x.dtype
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mine.grad, twin.grad, rtol=tolerance, atol=tolerance)
    named = list(ghost.named_parameters()), dict(plain.named_parameters())
    for name, parameter in named[0]:
        torch.testing.assert_close(parameter.grad, named[1][name].grad, rtol=tolerance, atol=tolerance)
    state, expected_state = ghost.state_dict(), plain.state_dict()
    assert list(state) == list(expected_state)
    for name, value in state.items():
        torch.testing.assert_close(value, expected_state[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("dim", [2, 3, 4, 5])
def test_every_batch_size_equals_one_ghost_after_another(dim, grouping):
    for n in range(1, 3 * G + 2):
        if n == 1 and dim == 2:
            continue  # plain BatchNorm refuses one value per channel
        compare(make(dim), randn(n, dim), grouping=grouping, steps=1)


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("memory_format", ["channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("dim", [2, 3, 4, 5])
def test_memory_formats(dim, memory_format, grouping):
    for n in range(2, 3 * G + 2):
        compare(make(dim), randn(n, dim), grouping=grouping, memory_format=memory_format, steps=1)


@pytest.mark.parametrize("running_stats", ["sequential", "per_step"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("n", [3, 8, 11])
def test_running_statistics(n, grouping, momentum, running_stats):
    compare(make(4, momentum=momentum), randn(n, 4), grouping=grouping, running_stats=running_stats, steps=3)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_without_scale_or_running_statistics(options):
    compare(make(4, **options), randn(10, 4))
    compare(make(2, **options), randn(10, 2), grouping="strided")


def test_one_ghost_is_plain_batchnorm_bit_for_bit():
    for momentum in (0.1, None):
        plain = make(4, momentum=momentum).float()
        ghost = convert_ghost_batchnorm(copy.deepcopy(plain), 16)
        for n in (5, 16):
            x = randn(n, 4, dtype=torch.float32)
            assert torch.equal(ghost(x), plain(x))
        for name, value in ghost.state_dict().items():
            assert torch.equal(value, plain.state_dict()[name])


def test_sequential_update_is_the_closed_form_of_algorithm_1():
    x, eta = randn(12, 4), 0.1
    mean, var = torch.full((3,), 5.0, dtype=torch.float64), torch.full((3,), 7.0, dtype=torch.float64)
    expected = mean.clone()
    for ghost in x.split(4):
        expected = (1 - eta) * expected + eta * ghost.mean((0, 2, 3))
    ghost_batch_norm(x, mean, var, ghost_batch_size=4, momentum=eta)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)


def test_per_step_keeps_the_memory_of_plain_batchnorm():
    for running_stats, kept in (("sequential", 0.9**8), ("per_step", 0.9)):
        mean, var = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        x = torch.randn(32, 1, dtype=torch.float64)
        x = torch.cat([ghost - ghost.mean() for ghost in x.split(4)])  # nothing but the old statistics is left
        ghost_batch_norm(x, mean, var, ghost_batch_size=4, running_stats=running_stats)
        assert mean.item() == pytest.approx(kept, abs=1e-12)


def test_cumulative_average_over_several_batches_is_the_mean_over_all_ghosts():
    layer = GhostBatchNorm1d(3, momentum=None, ghost_batch_size=4, dtype=torch.float64)
    batches = [randn(8, 2), randn(12, 2)]
    for batch in batches:
        layer(batch)
    ghosts = torch.cat(batches).split(4)
    assert int(layer.num_batches_tracked) == 5
    torch.testing.assert_close(layer.running_mean, torch.stack([g.mean(0) for g in ghosts]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([g.var(0) for g in ghosts]).mean(0))


@given(
    n=st.integers(1, 200),
    g=st.integers(1, 40),
    values=st.integers(1, 3),
    grouping=st.sampled_from(["contiguous", "strided"]),
)
@settings(deadline=None, max_examples=300)
def test_slices_deal_out_each_sample_once(n, g, values, grouping):
    slices = ghost_slices(n, g, grouping=grouping, values_per_sample=values)
    assert [list(range(n))[s] for s in slices] == members(n, g, grouping, values)


def test_full_ghosts_do_not_depend_on_the_tail():
    x = randn(11, 4)
    y = ghost_batch_norm(x, None, None, ghost_batch_size=4)
    changed = torch.cat((x[:8], x[8:] * 100))
    assert torch.equal(ghost_batch_norm(changed, None, None, ghost_batch_size=4)[:8], y[:8])


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("n", [8, 9, 10])
def test_second_derivatives(n, grouping):
    x = torch.randn(n, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x, weight, bias):
        return ghost_batch_norm(x, None, None, weight, bias, ghost_batch_size=4, grouping=grouping)

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


def test_gradient_of_each_input_alone_and_of_a_sum():
    x = randn(10, 4)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = ghost_batch_norm(x, None, None, weight, bias, ghost_batch_size=4)
    y.sum().backward()  # an expanded gradient
    torch.testing.assert_close(bias.grad, torch.full((3,), 10.0 * 12, dtype=torch.float64))
    assert x.grad is None
    x.requires_grad_()
    y = ghost_batch_norm(x, None, None, weight.detach(), None, ghost_batch_size=4)
    (y**2).sum().backward()
    assert x.grad.abs().max() < 1e-3  # the sum of squares of a normalized ghost does not depend on it, but for eps


def test_two_forwards_before_a_backward():
    # The running statistics change in between; the backward pass must not have kept them.
    layer = GhostBatchNorm1d(3, ghost_batch_size=4, dtype=torch.float64)
    x = randn(10, 2).requires_grad_()
    total = (layer(x) ** 3).sum() + (layer(2 * x) ** 3).sum()
    for buffer in layer.buffers():
        buffer.zero_()
    total.backward()
    expected = sum((ghost_batch_norm(k * x, None, None, ghost_batch_size=4) ** 3).sum() for k in (1, 2))
    torch.testing.assert_close(x.grad, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model = nn.Sequential(nn.Linear(4, 3), GhostBatchNorm1d(3, ghost_batch_size=4)).double()
    x = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    (checkpoint(model, x, use_reentrant=reentrant) ** 3).sum().backward()
    gradient = x.grad.clone()
    x.grad = None
    (model(x) ** 3).sum().backward()
    torch.testing.assert_close(x.grad, gradient)


def test_functional_transforms():
    x = randn(10, 2)

    def loss(x):
        return (ghost_batch_norm(x, None, None, ghost_batch_size=4) ** 3).sum()

    y = x.clone().requires_grad_()
    loss(y).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), y.grad)


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reduced_precision_is_no_worse_than_batchnorm(dtype, grouping):
    torch.manual_seed(0)
    plain = make(4)
    x = (torch.randn(67, 3, 8, 8, dtype=torch.float64) + 1).to(dtype)
    exact = one_after_another(copy.deepcopy(plain), x.double(), 16, grouping=grouping)
    layer = plain.float()
    ghost = convert_ghost_batchnorm(copy.deepcopy(layer), 16, grouping=grouping)
    theirs = one_after_another(layer, x, 16, grouping=grouping)
    ours = ghost(x)
    assert ours.dtype == dtype
    assert ghost.running_var.dtype == torch.float32
    mine, others = (ours - exact).abs(), (theirs - exact).abs()
    assert mine.mean() <= 1.1 * others.mean() + 1e-8
    assert mine.max() <= 1.5 * others.max() + 1e-7  # one number's roundings
    torch.testing.assert_close(ghost.running_var, layer.running_var, rtol=1e-5, atol=1e-6)


def test_half_parameters_keep_statistics_in_float32():
    layer = GhostBatchNorm1d(3, ghost_batch_size=16).to(torch.bfloat16)
    x = randn(50, 2, dtype=torch.bfloat16).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert y.dtype == layer.weight.grad.dtype == x.grad.dtype == layer.running_mean.dtype == torch.bfloat16
    exact = ghost_batch_norm(x.detach().double(), None, None, ghost_batch_size=16)
    assert (y - exact).abs().max() < 0.02


def test_autocast_keeps_statistics_in_float32():
    layer = convert_ghost_batchnorm(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(20, 4))
    assert y.dtype == torch.bfloat16
    assert layer[1].running_mean.dtype == torch.float32


def test_input_batch_of_none():
    assert GhostBatchNorm1d(3, ghost_batch_size=4)(torch.empty(0, 3, 5)).shape == (0, 3, 5)


def test_one_value_per_channel_is_refused_as_by_batchnorm():
    x = torch.randn(6, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ghost_batch_norm(x, None, None, ghost_batch_size=1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ghost_batch_norm(x[:1], None, None, ghost_batch_size=4)
    assert ghost_batch_norm(x[:, :, None].expand(6, 3, 2) * 1.0, None, None, ghost_batch_size=1).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"ghost_batch_size": True}, TypeError, "ghost_batch_size"),
        ({"ghost_batch_size": 4.0}, TypeError, "ghost_batch_size"),
        ({"ghost_batch_size": 0}, ValueError, "ghost_batch_size"),
        ({"running_stats": "mean"}, ValueError, "running_stats must be one of sequential, per_step"),
        ({"grouping": "random"}, ValueError, "grouping must be one of contiguous, strided"),
        ({"momentum": 1.5}, ValueError, "momentum"),
        ({"momentum": None, "running_mean": torch.zeros(3), "running_var": torch.ones(3)}, ValueError, "num_batches"),
        ({"running_mean": torch.zeros(3)}, ValueError, "running_mean"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"x": torch.randn(5)}, ValueError, r"\(N, C\)"),
    ],
)
def test_bad_arguments(changes, error, words):
    arguments = {"x": torch.randn(8, 3), "running_mean": None, "running_var": None, "ghost_batch_size": 4} | changes
    with pytest.raises(error, match=words):
        ghost_batch_norm(**arguments)


@pytest.mark.compiler
@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("dim", [2, 4])  # the formula, and the kernels as one operator
def test_compiled_without_graph_breaks(dim, grouping):
    torch._dynamo.reset()
    plain = make(dim)
    ghost = convert_ghost_batchnorm(copy.deepcopy(plain), G, grouping=grouping)
    compiled = torch.compile(ghost, fullgraph=True, backend="aot_eager")
    for n in (2 * G, 2 * G + 1):
        mine, twin = (randn(n, dim).requires_grad_() for _ in range(2))
        twin.data.copy_(mine.data)
        y, expected = compiled(mine), one_after_another(plain, twin, G, grouping=grouping)
        (y**3).sum().backward()
        (expected**3).sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.grad, twin.grad, rtol=1e-10, atol=1e-10)
    for name, value in ghost.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_on_cuda(dtype, grouping):
    plain = make(4).to("cuda")
    x = randn(3 * G + 2, 4).to("cuda")
    if dtype == torch.float64:
        for memory_format in ("contiguous", "channels_last"):
            compare(plain, x, grouping=grouping, memory_format=memory_format)
    else:
        compare(plain.float(), x.to(dtype), grouping=grouping, tolerance=3e-2)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dim", [2, 4])
def test_layers_read_no_number_from_their_device(dim, momentum):
    # Tensors on "meta" have none to read: a CUDA device would have to be waited for.
    for n in (3, 4, 8, 9, 11):
        for grouping in ("contiguous", "strided"):
            for running_stats in ("sequential", "per_step"):
                options = {"grouping": grouping, "running_stats": running_stats}
                layer = convert_ghost_batchnorm(make(dim, momentum=momentum), G, **options).to("meta")
                x = torch.empty(n, 3, *SPATIAL[dim], dtype=torch.float64, device="meta", requires_grad=True)
                layer(x).sum().backward()
                assert x.grad.shape == x.shape
                assert layer.weight.grad.device.type == "meta"
