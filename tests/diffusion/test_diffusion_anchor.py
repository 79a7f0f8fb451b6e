"""Where the weights started: groups, precision, and models that are others."""

import pytest
import torch
from diffusion_runs import KEY, Net, Weights, fit, loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gap.diffusion import (
    UltraSlowDiffusion,
    norms_and_biases,
    weight_displacement,
)
from lightning_gap.diffusion.anchor import Anchor, folder_of_shards, weights_of
from lightning_gap.diffusion.distance import present_parameters

LAYERS = {
    "net.0": ("net.0.weight", "net.0.bias"),
    "net.1": ("net.1.weight", "net.1.bias"),
    "net.4": ("net.4.weight", "net.4.bias"),
}


def assert_columns_are(trace, weights, names, suffix=""):
    for i, t in enumerate(trace["updates"]):
        expected = weights.displacement(round(t), *names)
        measured = [trace[name + suffix][i] for name in expected._fields]
        assert measured == pytest.approx(tuple(expected), rel=1e-6)


def test_layers_and_named_groups(tmp_path):
    diffusion = UltraSlowDiffusion(
        points_per_decade=3, per_layer=True, groups={"biases": r"bias$", "vectors": norms_and_biases}
    )
    weights = Weights()
    run, _ = fit(tmp_path, weights, diffusion, max_epochs=2)
    trace = diffusion.trace
    assert_columns_are(trace, weights, [name for names in LAYERS.values() for name in names])
    for layer, names in LAYERS.items():
        assert_columns_are(trace, weights, names, f"/{layer}")
    assert_columns_are(trace, weights, ["net.0.bias", "net.1.bias", "net.4.bias"], "/biases")
    assert_columns_are(trace, weights, ["net.0.bias", "net.1.weight", "net.1.bias", "net.4.bias"], "/vectors")
    logged = {name.removeprefix(KEY) for name in run.callback_metrics if "/" in name.removeprefix(KEY)}
    assert logged == {f"distance/{group}" for group in (*LAYERS, "biases", "vectors")}


@pytest.mark.parametrize("exclude", [norms_and_biases, r"bias|^net\.1\."])
def test_excluded_parameters_are_not_measured(tmp_path, exclude):
    diffusion, weights = UltraSlowDiffusion(points_per_decade=3, exclude=exclude), Weights()
    fit(tmp_path, weights, diffusion, max_epochs=1)
    assert set(diffusion.state_dict()["anchor"]) == {"net.0.weight", "net.4.weight"}
    assert_columns_are(diffusion.trace, weights, ["net.0.weight", "net.4.weight"])


def test_a_group_without_parameters_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"groups\['head'\] matches no.*net\.0\.weight"):
        fit(tmp_path, UltraSlowDiffusion(groups={"head": "classifier"}))


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-4), ("bfloat16", 1e-3)])
def test_half_precision_anchor_is_half_the_memory_and_nearly_exact(tmp_path, dtype, error):
    class Wide(Net):
        def __init__(self):
            super().__init__(lr=0.01)
            self.net = nn.Sequential(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 200), nn.Tanh(), nn.Linear(200, 1))

    exact, half = UltraSlowDiffusion(), UltraSlowDiffusion(anchor_dtype=dtype, anchor_device="cpu")
    for diffusion in (exact, half):
        torch.manual_seed(0)
        fit(tmp_path, diffusion, model=Wide(), max_epochs=4)
    bytes_of = lambda diffusion: sum(t.nbytes for t in diffusion.state_dict()["anchor"].values())  # noqa: E731
    assert 2 * bytes_of(half) == bytes_of(exact) == 4 * 82_401
    assert half.trace["distance"] == pytest.approx(exact.trace["distance"], rel=10 * error)
    assert half.trace["distance"][5:] == pytest.approx(exact.trace["distance"][5:], rel=error)
    assert half.trace["weight_norm"] == exact.trace["weight_norm"]


def test_anchor_that_half_precision_cannot_hold_is_refused(tmp_path):
    model = Net()
    with torch.no_grad():
        model.net[0].weight.fill_(1e6)
    with pytest.raises(MisconfigurationException, match="'float16' cannot hold the initial weights"):
        fit(tmp_path, UltraSlowDiffusion(anchor_dtype="float16"), model=model)


def test_group_named_as_a_layer_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"'net\.0' is the name of a layer and one of `groups`"):
        fit(tmp_path, UltraSlowDiffusion(per_layer=True, groups={"net.0": "bias"}))


def test_nothing_to_track_is_refused(tmp_path):
    model = Net()
    model.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="no parameter with requires_grad=True"):
        fit(tmp_path, UltraSlowDiffusion(), model=model)


def test_layers_of_configure_model_are_tracked_and_frozen_ones_not(tmp_path):
    class Late(Net):
        def configure_model(self):
            if not hasattr(self, "late"):
                self.late = nn.Linear(1, 1)
                self.net[0].requires_grad_(False)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.mse_loss(self.late(self.net(x)), y)

    diffusion = UltraSlowDiffusion()
    fit(tmp_path, diffusion, model=Late(), max_epochs=1)
    anchor = diffusion.state_dict()["anchor"]
    assert {"late.weight", "late.bias"} < set(anchor)
    assert not any(name.startswith("net.0.") for name in anchor)


def test_anchor_of_another_model_is_refused(tmp_path):
    diffusion = UltraSlowDiffusion()
    run, _ = fit(tmp_path, diffusion, max_epochs=1)
    other = Net()
    other.net[4] = nn.Linear(8, 1, bias=False)
    run.fit_loop.max_epochs = 2
    with pytest.raises(MisconfigurationException, match=r"another model.*net\.4\.bias"):
        run.fit(other, loader(), loader(shuffle=False))


def test_an_anchor_needs_no_trainer():
    net = Net()
    start = {name: p.detach().double().clone() for name, p in net.named_parameters()}
    anchor = Anchor(present_parameters(net), groups={"biases": "bias$"}, per_layer=True)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.5)
    squares = anchor.squares(anchor.tracked_in(net))
    now = {name: p.detach() for name, p in net.named_parameters()}
    assert anchor.displacement(squares) == pytest.approx(weight_displacement(now, start), rel=1e-6)
    for group, names in {**LAYERS, "biases": ("net.0.bias", "net.1.bias", "net.4.bias")}.items():
        expected = weight_displacement(*({name: tensors[name] for name in names} for tensors in (now, start)))
        assert anchor.displacement(squares, anchor.groups[group]) == pytest.approx(expected, rel=1e-6)
    assert anchor.parameters == sum(p.numel() for p in net.parameters())


def test_an_anchor_is_resumed_from_its_state_or_from_its_folder(tmp_path):
    net = Net()
    weights = {name: p.clone() for name, p in present_parameters(net).items()}
    here, written = Anchor(weights, dtype="bfloat16"), Anchor(weights, dtype="bfloat16")
    written.write(weights, str(tmp_path / "shards"))
    assert set(here.state_dict()) == set(written.state_dict()) == {"anchor", "anchor_folder", "shapes", "start_squares"}
    assert written.state_dict()["anchor"] is None
    now = {name: weight + 0.5 for name, weight in weights.items()}
    for anchor in (here, written):
        again = Anchor.resumed(anchor.state_dict(), weights_of(net, anchor.shapes), anchor.folder, dtype="bfloat16")
        assert again.displacement(again.squares(now)) == anchor.displacement(anchor.squares(now))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "shards").rename(moved / "shards")
    assert folder_of_shards(str(tmp_path / "shards"), moved / "last.ckpt") == str(moved / "shards")
    with pytest.raises(ValueError, match=r"neither in .* nor in .*: put the folder beside the checkpoint"):
        folder_of_shards(str(tmp_path / "shards"), tmp_path / "last.ckpt")
