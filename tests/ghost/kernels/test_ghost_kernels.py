"""Every way of computing, on one partition: the kernels at other limits than the measured ones, and the formula."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from ghost_reference import G, TwoRanks, as_format, make, members, one_after_another, randn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gap.ghost.kernels import Limits, Run, normalize, normalize_over_ranks
from lightning_gap.ghost.kernels.formula import formula

WAYS = {
    "as measured": normalize,
    "one by one": partial(normalize, limits=Limits(large_ghost=1)),
    "blocks of one ghost": partial(normalize, limits=Limits(block=1)),
    "blocks of a few, the last of fewer": partial(normalize, limits=Limits(block=300)),
    "one visit": partial(normalize, limits=Limits(one_visit=1)),
    "formula": formula,  # of torch.compile and of devices without native kernels
}


def partition(n, values, grouping):
    full, rest = divmod(n, G)
    if rest * values == 1:  # a sample without a variance
        return [Run(0, n - G - 1, full - 1), Run(n - G - 1, n, 1)]
    return [Run(0, full * G, full, grouping == "strided")] + ([Run(full * G, n, 1)] if rest else [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_equals_one_ghost_after_another(way, grouping, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for dim in (2, 3, 4, 5):
        for memory_format in ("contiguous", "channels_last", "transposed"):
            for n in (G, 5 * G, 7 * G + 3, 6 * G + 1 + (grouping == "strided" and dim == 2)):
                plain, x = make(dim), randn(n, dim).to(dtype)
                plain = plain if dtype == torch.float64 else plain.float()
                weight, bias = (copy.deepcopy(p) for p in plain.parameters())
                mine, twin = as_format(x, memory_format).detach().requires_grad_(), x.clone().requires_grad_()
                values = x[0, 0].numel()
                y, mean, var = WAYS[way](mine, weight, bias, plain.eps, partition(n, values, grouping))
                expected = one_after_another(plain, twin, G, grouping=grouping)
                upstream = torch.randn_like(expected)
                y.backward(upstream)
                expected.backward(upstream)
                assert y.dtype == dtype
                close(y, expected)
                close(mine.grad, twin.grad)
                close(weight.grad, plain.weight.grad)
                close(bias.grad, plain.bias.grad)
                ghosts = [
                    x[ghost].transpose(0, 1).flatten(1).to(mean.dtype) for ghost in members(n, G, grouping, values)
                ]
                close(mean, torch.stack([ghost.mean(1) for ghost in ghosts]))
                close(var, torch.stack([ghost.var(1) for ghost in ghosts]))


class Outputs(TorchDispatchMode):
    """Refuses calls that are given one memory for several outputs: kernels of other devices may use each as they go."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments if argument.is_out]
        places = sorted((out.data_ptr(), out.nbytes) for name in names if (out := (kwargs or {}).get(name)) is not None)
        assert all(start + size <= then for (start, size), (then, _) in pairwise(places)), func
        if func is torch.ops.aten.native_batch_norm.out:
            assert kwargs["save_mean"] is not kwargs["save_invstd"]
            assert kwargs["save_mean"].shape == kwargs["save_invstd"].shape == (args[0].shape[1],)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("limits", [Limits(), Limits(large_ghost=1), Limits(block=1)])
def test_no_call_writes_two_outputs_into_one_memory(limits):
    with Outputs():
        for dim in (2, 3, 4, 5):
            for memory_format in ("contiguous", "channels_last"):
                x = as_format(randn(11, dim), memory_format).requires_grad_()
                weight, bias = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
                for grouping in ("contiguous", "strided"):
                    runs = partition(11, x[0, 0].numel(), grouping)
                    normalize(x, weight, bias, 1e-5, runs, limits)[0].sum().backward()
                normalize_over_ranks(x, weight, bias, 1e-5, TwoRanks(), limits)[0].sum().backward()


@pytest.mark.compiler
@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
def test_operator_of_compiled_graphs_is_what_it_declares(grouping):
    # Shapes, strides and dtypes, as the compiler is told them and as the kernels give them.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    runs = [0, 8, 2, int(grouping == "strided"), 8, 10, 1, 0]
    for dim, dtype in ((4, torch.float64), (5, torch.float64), (4, torch.bfloat16)):
        for memory_format in ("contiguous", "channels_last"):
            x = as_format(randn(10, dim, dtype=dtype), memory_format).requires_grad_()
            statistics = torch.float32 if dtype == torch.bfloat16 else dtype
            weight, bias = (torch.randn(3, dtype=statistics, requires_grad=True) for _ in range(2))
            for arguments in ((x, weight, bias), (x, None, None), (x.detach(), weight, None)):
                torch.library.opcheck(torch.ops.lightning_gap.ghost_norm, (*arguments, 1e-5, runs), test_utils=checks)
