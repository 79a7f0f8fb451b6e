import copy

import pytest
import torch
from torch import nn

from lightning_gap import convert_ghost_batchnorm, recalibrate_batchnorm


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3), nn.BatchNorm1d(3, momentum=None)
    ).double()


def batches(count=5, n=8):
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, n, 4, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("ghost", [None, 4])
def test_statistics_are_averages_over_all_batches(ghost):
    model = network() if ghost is None else convert_ghost_batchnorm(network(), ghost)
    model(batches()[0])
    weights = copy.deepcopy(dict(model.named_parameters()))
    model[1].eval()
    modes = [layer.training for layer in model.modules()]
    random = torch.get_rng_state()
    assert recalibrate_batchnorm(model, batches()) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert [layer.training for layer in model.modules()] == modes
    assert [model[1].momentum, model[4].momentum] == [0.1, None]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name])
        assert weight.grad is None

    with torch.no_grad():
        seen = torch.stack(batches()).flatten(0, 1)
        first = model[0](seen).unflatten(0, (-1, ghost or 8))
        normalized = (first - first.mean(1, keepdim=True)) / (first.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        second = model[3](normalized)
    for layer, x in ((model[1], first), (model[4], second)):
        torch.testing.assert_close(layer.running_mean, x.mean(1).mean(0))
        torch.testing.assert_close(layer.running_var, x.var(1).mean(0))
        assert int(layer.num_batches_tracked) == len(x)


def test_what_a_batch_is():
    expected = recalibrate_batchnorm(network(), batches()).state_dict()
    for loader, forward in (
        ([(x, None) for x in batches()], None),
        ([[x, 3] for x in batches()], None),
        ([{"x": x} for x in batches()], "dict"),
    ):
        model = network()
        recalibrate_batchnorm(model, loader, forward=forward and (lambda batch, model=model: model(batch["x"])))
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name])
    few = recalibrate_batchnorm(network(), batches(), max_batches=2).state_dict()
    for name, value in recalibrate_batchnorm(network(), batches()[:2]).state_dict().items():
        assert torch.equal(value, few[name])


def test_layers_without_statistics_or_batches_are_left_alone():
    model = nn.ModuleDict(
        {"used": nn.BatchNorm1d(4), "unused": nn.BatchNorm1d(4), "none": nn.BatchNorm1d(4, track_running_stats=False)}
    ).double()
    model["unused"](batches()[0] + 3)
    before = copy.deepcopy(model["unused"].state_dict())
    recalibrate_batchnorm(model, batches(), forward=lambda x: model["none"](model["used"](x)))
    assert int(model["used"].num_batches_tracked) == 5
    for name, value in model["unused"].state_dict().items():
        assert torch.equal(value, before[name])


def test_errors_leave_the_model_as_it_was():
    model = network()
    model(batches()[0])
    before = copy.deepcopy(model.state_dict())

    def failing():
        yield from batches()
        raise RuntimeError("no more")

    for loader, error, words in ((failing(), RuntimeError, "no more"), ([], ValueError, "loader gave no batch")):
        with pytest.raises(error, match=words):
            recalibrate_batchnorm(model, loader)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        assert all(layer.training for layer in model.modules())
        assert model[1].momentum == 0.1
    with pytest.raises(ValueError, match="no BatchNorm layer with running statistics"):
        recalibrate_batchnorm(nn.Linear(3, 3), batches())
    with pytest.raises(ValueError, match="max_batches"):
        recalibrate_batchnorm(model, batches(), max_batches=0)
