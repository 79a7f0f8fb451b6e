"""Compiled passes that visit each ghost once, against the formula in double, and where they are taken."""

import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gap import native
from lightning_gap.ghost import GhostBatchNorm1d
from lightning_gap.ghost.kernels import Limits, Run, normalize, one_visit
from lightning_gap.ghost.kernels.formula import formula

pytestmark = pytest.mark.compiler
ALWAYS = Limits(one_visit=1, large_ghost=1 << 40)
NEVER = Limits(one_visit=1 << 60)
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
    parameters = [t.to(dtype) if affine else None for t in (weight, bias)]
    return [x.to(dtype), *parameters, upstream.to(dtype)]


def check(shape, size, strided, dtype, layout="contiguous", *, affine=True, shift=0.0, seed=0):
    """Errors are roundings: no larger than those of torch's kernels, where these are not small themselves."""
    x, weight, bias, upstream = samples(shape, dtype, seed=seed, shift=shift, affine=affine)
    runs, x = runs_of(shape[0], size, strided), LAYOUTS[layout](x)
    mine = all_of(normalize, x, weight, bias, upstream, runs, limits=ALWAYS)
    torchs = all_of(normalize, x, weight, bias, upstream, runs, limits=NEVER)
    right = all_of(formula, *(t if t is None else t.double() for t in (x, weight, bias, upstream)), runs)
    rounding = 16 * torch.finfo(dtype).eps
    for a, b, exact in zip(mine, torchs, right, strict=True):
        assert a.dtype == b.dtype == dtype
        assert a.stride() == b.stride()
        error, theirs = ((t.double() - exact).norm() for t in (a, b))
        assert error <= rounding * (exact.norm() + exact.numel() ** 0.5) + 2 * theirs


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 70), ghosts=st.integers(2, 4), rest=st.integers(2, 9), channels=st.integers(1, 150),
    strided=st.booleans(), affine=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_features_equal_the_formula(size, ghosts, rest, channels, strided, affine, dtype):
    check((size * ghosts + min(rest, size - 1) * (size > 2), channels), size, strided, dtype, affine=affine)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 9), ghosts=st.integers(2, 4), channels=st.integers(1, 40), height=st.integers(1, 12),
    width=st.integers(1, 12), strided=st.booleans(), affine=st.booleans(), layout=st.sampled_from([*LAYOUTS]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
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
    layer, plain = GhostBatchNorm1d(256, ghost_batch_size=32), torch.nn.BatchNorm1d(256)
    x, _, _, upstream = samples((256, 256), torch.float32)
    layer(x[:64]).sum().backward()
    assert not taken
    layer.reset_running_stats()
    layer(x).backward(upstream)
    assert taken == ["forward", "backward"]
    for ghost in x.split(32):
        plain(ghost)
    torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=1e-5, atol=1e-6)
    assert int(layer.num_batches_tracked) == 8


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


def test_strided_features_are_one_operator_of_a_compiled_graph():
    layer = GhostBatchNorm1d(256, ghost_batch_size=32, grouping="strided")
    twin = GhostBatchNorm1d(256, ghost_batch_size=32, grouping="strided")
    x, _, _, upstream = samples((256, 256), torch.float32)
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
