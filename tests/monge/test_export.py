"""A fitted map leaves Lightning: torch.export and ONNX, for any number of samples."""

import pytest
import torch
from map_kinds import KINDS, started
from torch import nn

from lightning_gap import MongeMap
from lightning_gap.monge import EntropicMap, ResidualMLP


@pytest.fixture(params=["chosen", "residual"])
def model(request):
    torch.manual_seed(0)
    model = MongeMap(2, hidden=(8, 8)) if request.param == "chosen" else MongeMap(map=ResidualMLP(2, (8, 8)))
    if request.param == "residual":
        nn.init.normal_(model.map.displacement[-1].weight)
    return model.eval()


def test_torch_export_takes_any_number_of_samples(model, tmp_path):
    n = torch.export.Dim("n")
    program = torch.export.export(model.map, (torch.zeros(2, 2),), dynamic_shapes=({0: n},))
    torch.export.save(program, tmp_path / "map.pt2")
    loaded = torch.export.load(tmp_path / "map.pt2").module()
    for rows in (1, 5, 300):
        x = torch.randn(rows, 2)
        assert not torch.equal(model.transport(x), x)
        torch.testing.assert_close(loaded(x), model.transport(x))


def some_rows(made):
    n = torch.export.Dim("n")
    few = tuple(given[:7] for given in made.inputs)
    return few, tuple({0: n} for _ in few)


NETWORKS = [kind for kind in KINDS if not kind.startswith("entropic")]


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_exports_for_any_number_of_samples(kind, tmp_path):
    made = started(kind)
    few, shapes = some_rows(made)
    program = torch.export.export(made.net, few, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "map.pt2")
    loaded = torch.export.load(tmp_path / "map.pt2").module()
    for rows in (1, 5, 64):
        given = [samples[:rows] for samples in made.inputs]
        torch.testing.assert_close(loaded(*given), made.net(*given))
    assert not torch.equal(made.net(*made.inputs), made.x)


def test_a_plan_does_not_export_and_says_what_does():
    with pytest.raises(NotImplementedError, match=r"export a network that starts at the plan"):
        torch.export.export(EntropicMap(2), (torch.zeros(2, 2),))


def test_onnx_takes_any_number_of_samples(model, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    n = torch.export.Dim("n")
    torch.onnx.export(model.map, (torch.zeros(2, 2),), tmp_path / "map.onnx", dynamo=True, dynamic_shapes=({0: n},))
    session = runtime.InferenceSession(tmp_path / "map.onnx")
    (name,) = (given.name for given in session.get_inputs())
    for rows in (1, 5, 300):
        x = torch.randn(rows, 2)
        (images,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(images), model.transport(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_onnx_takes_every_network(kind, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    made = started(kind)
    few, shapes = some_rows(made)
    torch.onnx.export(made.net, few, tmp_path / "map.onnx", dynamo=True, dynamic_shapes=shapes)
    session = runtime.InferenceSession(tmp_path / "map.onnx")
    names = [given.name for given in session.get_inputs()]
    for rows in (1, 5, 64):
        given = [samples[:rows] for samples in made.inputs]
        (images,) = session.run(None, {name: side.numpy() for name, side in zip(names, given, strict=True)})
        torch.testing.assert_close(torch.from_numpy(images), made.net(*given).detach(), rtol=1e-4, atol=1e-5)
