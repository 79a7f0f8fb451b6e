"""Compiled passes that visit each ghost once, against the formula in double, and where they are taken."""

import ctypes
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_gap import native
from lightning_gap.ghost import GhostBatchNorm1d, ghost_batch_norm
from lightning_gap.ghost.kernels import Limits, Run, normalize, one_visit
from lightning_gap.ghost.kernels.formula import formula
from lightning_gap.ghost.kernels.layout import statistics_dtype
from lightning_gap.native import native_library

pytestmark = pytest.mark.compiler
ALWAYS = Limits(one_visit=1, large_ghost=1 << 40)
NEVER = Limits(one_visit=1 << 60)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = {"contiguous": lambda x: x.contiguous(), "inside": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1)}


def runs_of(samples, size, strided):
    full, rest = divmod(samples, size)
    return [Run(0, full * size, full, strided)] + ([Run(full * size, samples, 1)] if rest else [])


def all_of(way, x, weight, bias, upstream, runs, **options):
    """Output, statistics and gradients."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    y, mean, var = way(*leaves, 1e-5, runs, **options)
    gradients = torch.autograd.grad(y, [t for t in leaves if t is not None], upstream)
    return [y.detach(), mean, var, *gradients]


def samples(shape, dtype, *, seed=0, shift=0.0, affine=True):
    generator = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * torch.linspace(0.5, 2, shape[1], dtype=torch.float64).view(-1, *(1,) * (len(shape) - 2)) + shift
    parameters = [t.to(statistics_dtype(x.to(dtype))) if affine else None for t in (weight, bias)]
    return [x.to(dtype), *parameters, upstream.to(dtype)]


def check(shape, size, strided, dtype, layout="contiguous", *, affine=True, shift=0.0, seed=0):
    """Errors are roundings: no larger than those of torch's kernels, where these are not small themselves."""
    x, weight, bias, upstream = samples(shape, dtype, seed=seed, shift=shift, affine=affine)
    runs, x = runs_of(shape[0], size, strided), LAYOUTS[layout](x)
    mine = all_of(normalize, x, weight, bias, upstream, runs, limits=ALWAYS)
    torchs = all_of(normalize, x, weight, bias, upstream, runs, limits=NEVER)
    right = all_of(formula, *(t if t is None else t.double() for t in (x, weight, bias, upstream)), runs)
    for a, b, exact in zip(mine, torchs, right, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        rounding = 16 * torch.finfo(a.dtype).eps
        error, theirs = ((t.double() - exact).norm() for t in (a, b))
        assert error <= rounding * (exact.norm() + exact.numel() ** 0.5) + 2 * theirs


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 150), ghosts=st.integers(2, 4), rest=st.integers(2, 9), channels=st.integers(1, 150),
    strided=st.booleans(), affine=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_features_equal_the_formula(size, ghosts, rest, channels, strided, affine, dtype):
    check((size * ghosts + min(rest, size - 1) * (size > 2), channels), size, strided, dtype, affine=affine)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 9), ghosts=st.integers(2, 4), channels=st.integers(1, 40), height=st.integers(1, 12),
    width=st.integers(1, 12), strided=st.booleans(), affine=st.booleans(), layout=st.sampled_from([*LAYOUTS]),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_images_equal_the_formula(size, ghosts, channels, height, width, strided, affine, layout, dtype):
    check((size * ghosts, channels, height, width), size, strided, dtype, layout, affine=affine)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided", [False, True])
def test_ghosts_larger_than_a_cache_equal_the_formula(layout, strided):
    check((6, 5, 190, 190), 3, strided, torch.float32, layout)
    check((4, 70, 40, 40), 2, strided, torch.float32, layout)


@pytest.mark.parametrize("shape", [(96, 40), (96, 40, 5, 5)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_far_from_zero_keep_their_variance(shape, layout):
    check(shape, 32, False, torch.float32, layout, shift=300.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_samples_unlike_all_others_cost_no_digits(layout):
    x, weight, bias, _ = samples((128, 20, 3, 3), torch.float32)
    x[:8] += 1e4  # what deviations are first taken from
    x = LAYOUTS[layout](x)
    runs = [Run(0, 128, 2)]
    for mine, right in zip(
        normalize(x, weight, bias, 1e-5, runs, ALWAYS),
        formula(x.double(), weight.double(), bias.double(), 1e-5, runs),
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), right, rtol=3e-6, atol=3e-5)


def test_constant_channels_have_no_variance():
    x = torch.full((64, 20), 0.1)
    y, mean, var = normalize(x, None, None, 1e-5, [Run(0, 64, 2)], ALWAYS)
    torch.testing.assert_close(mean, torch.full((2, 20), 0.1))
    assert float(var.max()) < 1e-14
    assert float(y.abs().max()) < 1e-4


def test_a_nan_stays_within_its_channel_of_its_ghost():
    for shape in ((64, 20), (8, 20, 7, 7)):
        x, weight, bias, _ = samples(shape, torch.float32)
        clean = normalize(x, weight, bias, 1e-5, runs_of(shape[0], shape[0] // 2, False), ALWAYS)[0]
        x[0, 3] = float("nan")
        y, mean, var = normalize(x, weight, bias, 1e-5, runs_of(shape[0], shape[0] // 2, False), ALWAYS)
        half = shape[0] // 2
        assert y[:half, 3].isnan().all()
        assert mean[0, 3].isnan()
        assert var[0, 3].isnan()
        y[:half, 3] = clean[:half, 3]
        assert torch.equal(y, clean)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(64, 300), (8, 70, 9, 9)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch, shape, layout, strided):
    monkeypatch.setattr(one_visit, "_FEW", 16)
    x, weight, bias, upstream = samples(shape, torch.float32)
    before = torch.get_num_threads()
    found = []
    for size in (shape[0] // 2, 2):  # fewer ghosts than threads, and more
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                runs = runs_of(shape[0], size, strided)
                found.append(all_of(normalize, LAYOUTS[layout](x), weight, bias, upstream, runs, limits=ALWAYS))
            finally:
                torch.set_num_threads(before)
        one, three = found[-2:]
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_a_layer_takes_the_passes_from_a_size_on_and_updates_its_statistics(monkeypatch):
    taken = []
    real = one_visit._call
    monkeypatch.setattr(one_visit, "_call", lambda name, *rest: (taken.append(name), real(name, *rest))[1])
    layer, plain = GhostBatchNorm1d(50, ghost_batch_size=32), torch.nn.BatchNorm1d(50)
    x, _, _, upstream = samples((128, 50), torch.float32)
    layer(x[:64]).sum().backward()
    assert not taken
    layer.reset_running_stats()
    layer(x).backward(upstream)
    assert taken == ["forward", "backward"]
    for ghost in x.split(32):
        plain(ghost)
    torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=1e-5, atol=1e-6)
    assert int(layer.num_batches_tracked) == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_nan_of_its_ghosts_channel_as_in_batch_norm(dtype, layout, value):
    for shape in ((96, 20), (12, 20, 7, 7)):
        x, weight, bias, upstream = samples(shape, dtype)
        x[1, 3] = value
        upstream[shape[0] // 2, 7] = value
        runs = runs_of(shape[0], shape[0] // 2, False)
        mine = all_of(normalize, LAYOUTS[layout](x), weight, bias, upstream, runs, limits=ALWAYS)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        theirs = torch.cat(
            [torch.nn.functional.batch_norm(ghost, None, None, *leaves[1:], True) for ghost in leaves[0].chunk(2)]
        )
        theirs.backward(upstream)
        for a, b in ((mine[0], theirs), *zip(mine[3:], (t.grad for t in leaves), strict=True)):
            assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize("running_stats", ["sequential", "per_step"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
def test_running_statistics_are_those_of_torchs_kernels(momentum, running_stats):
    x, _, _, _ = samples((300, 40), torch.float32)
    found = []
    for every in (1, 2):  # of a view, which the compiled passes do not take
        buffers = torch.zeros(40 * every)[::every], torch.ones(40 * every)[::every], torch.tensor(0)
        options = {"momentum": momentum, "running_stats": running_stats, "num_batches_tracked": buffers[2]}
        for part in x.split(150):
            ghost_batch_norm(part, *buffers[:2], ghost_batch_size=32, **options)
        found.append(buffers)
        assert buffers[0]._version == buffers[1]._version == 2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_parameters_of_other_numbers_of_channels_are_refused():
    x, weight, _, _ = samples((128, 40), torch.float32)
    for wrong in (weight[:-1], weight[:1], weight.unsqueeze(0), torch.empty(40, device="meta")):
        with pytest.raises(ValueError, match="40 channels"):
            ghost_batch_norm(x, None, None, wrong, ghost_batch_size=32)
        with pytest.raises(ValueError, match="40 channels"):
            ghost_batch_norm(x, None, None, weight, wrong, ghost_batch_size=32)


@pytest.mark.parametrize("parameter", [torch.randn(80)[::2], torch.randn(1).expand(40)])
def test_parameters_may_be_views(parameter):
    x, _, _, upstream = samples((128, 40), torch.float32)
    runs = runs_of(128, 32, False)
    mine = all_of(normalize, x, parameter, parameter, upstream, runs, limits=ALWAYS)
    for a, b in zip(mine, all_of(normalize, x, parameter.clone(), parameter.clone(), upstream, runs), strict=True):
        assert torch.equal(a, b)


def test_tensors_without_memory_go_by_torchs_kernels():
    with FakeTensorMode():
        x = torch.randn(256, 64, requires_grad=True)
        y = GhostBatchNorm1d(64, ghost_batch_size=32)(x)
        y.sum().backward()
        assert x.grad.shape == y.shape == x.shape
    y = GhostBatchNorm1d(64, ghost_batch_size=32).to("meta")(torch.randn(256, 64, device="meta"))
    assert y.shape == (256, 64)


def test_without_a_compiler_torchs_kernels_are_taken_in_silence(monkeypatch):
    monkeypatch.setattr(native, "compiler", lambda: None)
    one_visit.one_visit_library.cache_clear()
    try:
        x, weight, bias, upstream = samples((256, 256), torch.float32)
        runs = [Run(0, 256, 8)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            without = all_of(normalize, x, weight, bias, upstream, runs)
        assert not one_visit.takes_one_visit(x, Limits())
    finally:
        one_visit.one_visit_library.cache_clear()
    monkeypatch.undo()
    for a, b in zip(without, all_of(normalize, x, weight, bias, upstream, runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
def test_features_are_one_operator_of_a_compiled_graph(grouping):
    layer, twin = (GhostBatchNorm1d(256, ghost_batch_size=32, grouping=grouping) for _ in range(2))
    x, _, _, upstream = samples((2048, 256), torch.float32)
    mine, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    compiled(mine).backward(upstream)
    twin(right).backward(upstream)
    assert any("ghost_norm" in name for name in seen)
    torch.testing.assert_close(mine.grad, right.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var, twin.running_var, rtol=1e-6, atol=1e-6)


def test_a_compiled_layer_takes_any_batch_and_keeps_no_more_than_its_statistics():
    layer, twin = (GhostBatchNorm1d(256, ghost_batch_size=128) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for samples_of_batch in (2048, 2304, 2100):
        x = torch.randn(samples_of_batch, 256, requires_grad=True)
        y = compiled(x)
        kept = [t for t in y.grad_fn.saved_tensors if t is not None]
        ghosts = -(-samples_of_batch // 128)
        assert sum(t.numel() for t in kept) <= x.numel() + layer.weight.numel() + 2 * ghosts * 256
        right = twin(x)
        torch.testing.assert_close(y, right)
        upstream = torch.randn_like(y)
        for a, b in zip(*(torch.autograd.grad(out, x, upstream) for out in (y, right)), strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(layer.running_mean, twin.running_mean)
    torch.testing.assert_close(layer.running_var, twin.running_var)


def test_half_precision_is_kept_as_torch_keeps_it():
    library = native_library(Path(__file__).with_name("half_precision.cpp"), {})
    assert library is not None
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=generator).to(torch.int32).view(torch.float32)
    edges = torch.tensor([0.0, -0.0, 65504.0, 65519.996, 65520.0, 2.0**-14, 2.0**-25, 1.5 * 2.0**-25, 1e38, 3.4e38])
    numbers = torch.cat((numbers, edges, -edges, edges[:4], patterns.view(torch.float16).float().repeat(2)))
    numbers = numbers[: len(numbers) // 32 * 32].contiguous()
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        wide, narrow = torch.empty(1 << 16), torch.empty(len(numbers), dtype=dtype)
        getattr(library, f"widen_{name}")(
            *(ctypes.c_void_p(t.data_ptr()) for t in (patterns, wide)), ctypes.c_long(1 << 16)
        )
        torch.testing.assert_close(wide, patterns.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
        getattr(library, f"narrow_{name}")(
            *(ctypes.c_void_p(t.data_ptr()) for t in (numbers, narrow)), ctypes.c_long(len(numbers))
        )
        torch.testing.assert_close(narrow, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_several_threads_may_call_at_once(monkeypatch):
    monkeypatch.setattr(one_visit, "_FEW", 16)
    x, weight, bias, upstream = samples((512, 70), torch.float32)
    runs = runs_of(512, 16, False)
    right = all_of(normalize, x, weight, bias, upstream, runs, limits=ALWAYS)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4) as pool:
            waiting = [
                pool.submit(all_of, normalize, x, weight, bias, upstream, runs, limits=ALWAYS) for _ in range(40)
            ]
            found = [each.result() for each in waiting]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, right, strict=True))


FORK = """
import os, torch
from lightning_gap.ghost.kernels import Limits, Run, normalize, one_visit
one_visit._FEW = 16
torch.set_num_threads(2)
x = torch.randn(64, 64)
run = lambda: normalize(x, None, None, 1e-5, [Run(0, 64, 8)], Limits(one_visit=1))[0]
before = run()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(run(), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_fork_has_threads_of_its_own():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=120)
