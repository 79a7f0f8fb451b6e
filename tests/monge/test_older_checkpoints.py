"""Checkpoints of older versions: each loads, maps as it did, and trains on as it would have."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from monge_runs import gaussians, trainer
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import Anneal, BrenierMap, ConditionalMap, ResidualMLP, StructuredMap
from lightning_gap.monge.checkpoint import build, describe
from lightning_gap.monge.transport_files import load_map

FOLDER = Path(__file__).parents[1] / "data"
EXPECTED = json.loads((FOLDER / "older_maps.json").read_text())
SOURCE, TARGET = gaussians()
LABELS = ["a", "b"] * 60

# The maps as they were made for the checkpoints.
MAPS = {
    "residual": lambda: MongeMap(
        map=ResidualMLP(2, hidden=(8,), start="gaussian"), rho=20.0, relative_fitting_epsilon=0.1,
        relative_gap_epsilon=0.02,
    ),
    "conditional": lambda: MongeMap(hidden=(8,)),
    "structured": lambda: MongeMap(
        map=StructuredMap(2, cost="pnorm(p=1.5)", hidden=(8,)), cost="pnorm(p=1.5)", conservative_weight=0.1,
        gap_weight=Anneal(2.0, 0.5, updates=6), epsilon_factor=Anneal(5.0, 1.0, updates=6),
        optimizer=partial(AdamW, lr=0.01), lr_scheduler=partial(CosineAnnealingLR, T_max=8),
    ),
    "brenier": lambda: MongeMap(map=BrenierMap(2, (4,), start="gaussian"), gap_weight=0.0),
}  # fmt: skip
KINDS = {"residual": ResidualMLP, "conditional": ConditionalMap, "structured": StructuredMap, "brenier": BrenierMap}


def data(name: str) -> SamplesDataModule:
    if name == "conditional":
        options = {"conditions": (LABELS, LABELS), "standardize": True, "batch_size": 10}
        return SamplesDataModule(SOURCE * 10 + 5, TARGET * 10, val_fraction=0.2, **options)
    return SamplesDataModule(SOURCE, TARGET, batch_size=24, val_fraction=0.2)


def images(model: MongeMap, name: str) -> list[list[float]]:
    if name == "conditional":
        return model.transport(SOURCE[:3] * 10, condition="b")
    return model.transport(SOURCE[:3])


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("load", [MongeMap.load_from_checkpoint, load_map])
def test_they_load(name, load):
    model = load(FOLDER / f"map_{name}.ckpt")
    assert type(model.map) is KINDS[name]
    torch.testing.assert_close(images(model, name), torch.tensor(EXPECTED[name]["images"]), rtol=1e-5, atol=1e-5)
    for epsilon in ("fitting_epsilon", "gap_epsilon"):
        assert float(getattr(model, epsilon)) == pytest.approx(EXPECTED[name][epsilon], rel=1e-6)
    assert model.epsilons.started
    assert model.rho == (20.0 if name == "residual" else None)
    if name == "structured":
        made = MAPS[name]()
        for argument in ("gap_weight", "epsilon_factor", "cost", "conservative_weight"):
            assert getattr(model, argument) == getattr(made, argument)
        for argument in ("optimizer", "lr_scheduler"):
            mine, theirs = (getattr(m, argument) for m in (model, made))
            assert (mine.func, mine.keywords) == (theirs.func, theirs.keywords)


# Epsilons that the older version decided otherwise stay as they were.
@pytest.mark.filterwarnings("ignore:MongeMap goes on from an earlier fit on other samples")
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("loaded", [False, True])
def test_training_goes_on(name, loaded):
    path = FOLDER / f"map_{name}.ckpt"
    torch.manual_seed(0)
    model = MongeMap.load_from_checkpoint(path) if loaded else MAPS[name]()
    trainer(max_steps=6, max_epochs=-1).fit(model, data(name), ckpt_path=path, weights_only=True)
    expected = torch.tensor(EXPECTED[name]["images_after_six"])
    torch.testing.assert_close(images(model, name), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "path",
    [
        "lightning_gap.monge.maps.ResidualMLP",
        "lightning_gap.monge.networks.ResidualMLP",
        "lightning_gap.monge.ResidualMLP",
    ],
)
def test_a_class_whose_module_is_gone_is_found_by_its_name(path):
    assert type(build("map", {"class_path": path, "init_args": {"dim": 2}})) is ResidualMLP
    with pytest.raises(ValueError, match="map: there is no class"):
        build("map", {"class_path": f"{path}s"})


@pytest.mark.parametrize(
    "made", [lambda: ResidualMLP(2), lambda: StructuredMap(2), lambda: Anneal(2.0, 1.0, updates=3)]
)
def test_descriptions_name_the_public_path(made):
    thing = made()
    described = describe(thing)
    assert described["class_path"] == f"lightning_gap.monge.{type(thing).__name__}"
    assert type(build("map", described)) is type(thing)


def test_the_old_name_of_rho_is_taken_and_told_of():
    with pytest.warns(DeprecationWarning, match="reach is called rho now"):
        model = MongeMap(2, reach=5.0)
    assert model.rho == model.hparams["rho"] == 5.0
    assert model.reach == 5.0


@pytest.mark.filterwarnings("error::DeprecationWarning")
@pytest.mark.parametrize("given", [{}, {"rho": 3.0}])
def test_the_old_name_in_a_checkpoint_is_not(given):
    model = MongeMap.load_from_checkpoint(FOLDER / "map_residual.ckpt", **given)
    assert model.rho == given.get("rho", 20.0)
