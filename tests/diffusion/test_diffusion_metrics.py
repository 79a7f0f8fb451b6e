import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_gap import precision
from lightning_gap.diffusion import UltraSlowDiffusionFit, WeightDistance, fit_diffusion, norms_and_biases


def move(module, by):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


def test_latest_distance_counts():
    layer = nn.Linear(3, 4)
    metric = WeightDistance(layer)
    with pytest.warns(UserWarning, match="called before the"):
        assert metric.compute().isnan()
    for step in (1, 2, 3):
        move(layer, 0.5)
        assert float(metric(layer)) == pytest.approx(0.5 * step * 4, rel=1e-6)  # 16 parameters
    assert float(metric.compute()) == pytest.approx(6, rel=1e-6)
    metric.reset()
    metric.update(layer)
    assert float(metric.compute()) == pytest.approx(6, rel=1e-6)


def test_relative_distance_without_biases():
    layer = nn.Linear(3, 4)
    start = layer.weight.detach().norm().item()
    metric = WeightDistance(layer, relative=True, exclude=norms_and_biases)
    move(layer, 0.5)
    metric.update(layer)
    assert float(metric.compute()) == pytest.approx(0.5 * 12**0.5 / start, rel=1e-6)


def test_anchor_is_in_the_state_of_the_module_that_holds_the_metric():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.metric = WeightDistance(self.layer)

    first, second = Holder(), Holder()
    move(first.layer, 1.0)
    second.load_state_dict(first.state_dict())
    second.metric.update(second.layer)
    assert float(second.metric.compute()) == pytest.approx(4, rel=1e-6)
    assert sum(p.numel() for p in first.parameters()) == 16  # the anchor is no parameter


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="must have the parameters of the one at the start, bias is not there"):
        WeightDistance(nn.Linear(3, 4)).update(nn.Linear(3, 4, bias=False))
    with pytest.raises(ValueError, match="exclude less"):
        WeightDistance(nn.Linear(3, 4), exclude=".")
    with pytest.raises(ValueError, match="not a regular expression"):
        WeightDistance(nn.Linear(3, 4), exclude="(")


def test_sharded_parameters_are_refused(sharded_layer):
    with pytest.raises(ValueError, match="sharded parameters"):
        WeightDistance(sharded_layer)


def test_fit_of_points_in_any_order_and_repeated():
    t = [1, 2, 3, 5, 10, 20, 50, 100, 200]
    d = [0.3 + math.log(u) + 0.05 * math.sin(u) for u in t]
    metric = UltraSlowDiffusionFit()
    metric.update(torch.tensor(t[5:]), torch.tensor(d[5:], dtype=torch.float64))
    for u, distance in zip(t[:6], d[:6], strict=True):
        metric.update(u, distance)
    fit = fit_diffusion(t, d)
    assert metric.fit() == fit
    values = metric.compute()
    assert float(values["log_slope"]) == fit.log_slope
    assert (float(values["alpha_low"]), float(values["alpha_high"])) == fit.alpha_interval


def test_too_few_points_are_refused_in_words():
    metric = UltraSlowDiffusionFit()
    with pytest.raises(ValueError, match="no points yet"):
        metric.fit()
    with pytest.raises(ValueError, match="two numbers or vectors"):
        metric.update(torch.ones(2), torch.ones(3))
    metric.update(torch.arange(1, 20), torch.arange(1, 20))
    with pytest.raises(ValueError, match=r"span 1\.28 decades"):
        metric.fit()


def test_plots():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    metric = UltraSlowDiffusionFit()
    metric.update(torch.logspace(0, 3, 30), torch.linspace(1, 2, 30))
    figure, ax = metric.plot()
    assert len(ax.lines) == 3
    matplotlib.pyplot.close(figure)
    distance = WeightDistance(nn.Linear(3, 4))
    figure, _ = distance.plot([torch.tensor(0.0), torch.tensor(1.0)])
    matplotlib.pyplot.close(figure)


class NoDouble(TorchDispatchMode):
    """Makes of "meta" a device without double precision, as Apple's GPUs are."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                assert tensor.dtype != torch.float64, func
        return result


def test_states_are_single_where_the_device_has_no_double(monkeypatch):
    monkeypatch.setattr(precision, "_WITHOUT_DOUBLE", {"meta"})
    layer = nn.Linear(3, 4)
    metric, fit = WeightDistance(layer), UltraSlowDiffusionFit()
    move(layer, 0.5)
    metric.update(layer)
    fit.update(1, 0.5)
    with NoDouble():
        for moved in (metric.to("meta"), fit.to("meta")):
            assert moved.device.type == "meta"
        fit.update(torch.tensor([2, 3], dtype=torch.int64), torch.tensor([0.5, 0.75], dtype=torch.float64))
        fit.update(4.0, 0.875)
        metric.reset()
        assert metric.displacement.dtype == torch.float32
        assert {state.dtype for state in (*fit.updates, *fit.distances)} == {torch.float32}
        fit.reset()


def test_states_are_double_elsewhere():
    metric = WeightDistance(nn.Linear(3, 4)).to("meta")
    assert metric.displacement.dtype == torch.float64
    assert WeightDistance(nn.Linear(3, 4)).float().displacement.dtype == torch.float64


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_distances_that_are_no_numbers_are_left_out_of_the_fit(value):
    clean, astray = UltraSlowDiffusionFit(), UltraSlowDiffusionFit()
    for t in (1, 3, 10, 30, 100, 300, 1000):
        clean.update(t, 0.5 + 2.0 * math.log(t))
        astray.update(t, 0.5 + 2.0 * math.log(t))
    astray.update(2000, value)
    with pytest.warns(UserWarning, match="leaves out 1 distances .* the one at update 2000"):
        assert astray.compute() == clean.compute()
