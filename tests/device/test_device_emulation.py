"""The emulated device breaks no rule that CUDA keeps."""

import copy
import io

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.emulated


def test_tensors_are_on_the_device(device):
    x = torch.ones(2, 3, device=device)
    assert (x.device, x.is_cuda, (x + 1).t().device) == (torch.device("cuda", 0), True, torch.device("cuda", 0))
    assert torch.tensor([1.0, 2.0], device=device).device.type == "cuda"
    assert (x.cpu() + 1).device.type == "cpu"
    layer = nn.Linear(3, 2).to(device)
    layer(x).sum().backward()
    assert layer.weight.grad.device.type == "cuda"
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x).cpu(), layer(x).cpu())
    with torch.device(device):
        assert torch.rand(3).device.type == "cuda"


def test_what_cuda_refuses(device):
    x = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.index_select(x, 0, torch.arange(2))
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=device, generator=torch.Generator())
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()
    assert float((x + torch.tensor(1.0)).sum()) == 6  # a number on the CPU is a number
    assert x[torch.arange(2)].shape == (2,)


def test_files_hold_plain_tensors(device):
    file = io.BytesIO()
    torch.save(nn.Linear(2, 1).to(device).state_dict(), file)
    file.seek(0)
    assert {type(t) for t in torch.load(file, weights_only=True).values()} == {torch.Tensor}


def test_counts(device):
    from counts import counting

    x = torch.rand(4, 4, device=device)
    pinned = torch.empty(4, 4, pin_memory=True)
    assert pinned.is_pinned()
    assert not torch.empty(4).is_pinned()
    with counting() as counts:
        y = (x @ x).t()
        pinned.copy_(y, non_blocking=True)
    assert counts.syncs.total() == 0
    assert counts.launches.total() == 2
    for wait in (
        lambda: float(x[0, 0]),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x[x > 2],
        lambda: (x > 0).nonzero(),
        lambda: bool(x.all()),
        lambda: x[0].repeat_interleave(torch.arange(4, device=device)),
        lambda: torch.linalg.inv(x),
        lambda: torch.empty(4, 4).copy_(x, non_blocking=True),
        lambda: torch.cuda.synchronize(),
        lambda: torch.cuda.Event().synchronize(),
    ):
        with counting() as counts:
            wait()
        assert counts.syncs.total() == 1
    with counting() as counts:
        x[0].repeat_interleave(torch.arange(4, device=device), output_size=6)
        torch.linalg.inv_ex(x)
        torch.linalg.solve_ex(x, x)
    assert counts.syncs.total() == 0
    with counting() as counts:
        x.new_tensor([1.0])
        torch.ones(3).to(device)
        x[torch.arange(2)]
    assert (counts.syncs.total(), counts.uploads.total()) == (0, 3)


def test_products_are_rounded_where_tf32_is_allowed(device):
    x = torch.rand(8, 8) + 1
    exact = x @ x
    assert torch.equal((x.to(device) @ x.to(device)).cpu(), exact)
    torch.set_float32_matmul_precision("high")
    try:
        error = ((x.to(device) @ x.to(device)).cpu() - exact).abs().max()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 1e-5 < error < 1e-1


def test_a_device_without_double(device):
    from masked import without_double

    x = torch.ones(3, device=device)
    with without_double(), pytest.raises(TypeError, match="float64"):
        x.double()
    assert x.double().dtype == torch.float64


def test_native_batch_norm_writes_to_its_buffers(device):
    # With one tensor for both, CUDA's kernel takes the reciprocal deviation for the mean.
    x = torch.rand(6, 2, device=device)
    mean, var = torch.full((2,), 3.0, device=device), torch.full((2,), 0.25, device=device)
    for shared in (False, True):
        buffers = [torch.empty(0, device=device) for _ in range(2)]
        y = torch.ops.aten.native_batch_norm.out(
            x, None, None, mean, var, False, 0.0, 0.0,
            out=torch.empty_like(x), save_mean=buffers[0], save_invstd=buffers[0 if shared else 1],
        )[0]  # fmt: skip
        torch.testing.assert_close(y.cpu(), (x.cpu() - (2.0 if shared else 3.0)) / 0.5)
