"""A checkpoint of MongeMap holds the map, and all that is needed to use it and to train on."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from monge_runs import FAST, gaussians, small, trainer, weights
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import Anneal, ConditionalMap, ResidualMLP, SphereMap, StructuredMap

MAPS = {
    "residual": lambda: ResidualMLP(2, hidden=(8,), start="gaussian"),
    "structured": lambda: StructuredMap(2, cost="pnorm(p=1.5)", hidden=(8,)),
    "potential": lambda: StructuredMap(2, hidden=(8,), potential=True),
    "conditional": lambda: ConditionalMap(2, num_conditions=2, hidden=(8,)),
}


def data(*, batch_size: int = 24, **options) -> SamplesDataModule:
    source, target = gaussians(120)
    return SamplesDataModule(source * 10 + 5, target * 10, batch_size=batch_size, val_fraction=0.2, **options)


def saved(model: MongeMap, path, samples: SamplesDataModule, **options) -> MongeMap:
    run = trainer(**options)
    run.fit(model, samples)
    run.save_checkpoint(path)
    return MongeMap.load_from_checkpoint(path, weights_only=True)


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_the_package_are_made_again(tmp_path, name):
    labels = ["a", "b"] * 60
    samples = data(conditions=(labels, labels), batch_size=10) if name == "conditional" else data()
    model = MongeMap(map=MAPS[name](), optimizer=FAST)
    loaded = saved(model, tmp_path / "map.ckpt", samples)
    assert type(loaded.map) is type(model.map)
    condition = {"condition": "b"} if name == "conditional" else {}
    x = gaussians(30)[0]
    assert torch.equal(loaded.transport(x, **condition), model.transport(x, **condition))
    assert not torch.allclose(model.transport(x, **condition), x)


def test_the_representation_and_the_default_conditional_map_are_in_it(tmp_path):
    labels = ["a", "b"] * 60
    samples = data(conditions=(labels, labels), batch_size=10, standardize=True)
    model = MongeMap(hidden=(8,), optimizer=FAST)
    loaded = saved(model, tmp_path / "map.ckpt", samples)
    assert isinstance(loaded.map, ConditionalMap)
    assert loaded.condition_names == ["a", "b"]
    x = gaussians(30)[0]
    assert torch.equal(loaded.transport(x, "b"), model.transport(x, "b"))
    assert torch.equal(loaded.representation.scale, model.representation.scale)


def test_training_goes_on_from_it_as_if_never_stopped(tmp_path):
    """Schedules, starts, reference samples and annealing, from the middle of an epoch."""

    def model() -> MongeMap:
        return small(
            map=ResidualMLP(2, hidden=(8,), start="gaussian"),
            gap_reference=gaussians(70)[0] * 10 + 5,
            gap_on="both",
            gap_weight=Anneal(2.0, 0.5, updates=6),
            epsilon_factor=Anneal(5.0, 1.0, updates=6),
            optimizer=partial(AdamW, lr=0.01),
            lr_scheduler=partial(CosineAnnealingLR, T_max=8),
        )

    torch.manual_seed(0)
    whole = model()
    trainer(max_steps=8, max_epochs=-1).fit(whole, data())
    torch.manual_seed(0)
    keep = ModelCheckpoint(tmp_path, filename="five", every_n_train_steps=5)
    trainer(max_steps=6, max_epochs=-1, enable_checkpointing=True, callbacks=[keep]).fit(model(), data())
    torch.manual_seed(0)
    resumed = model()
    again = ModelCheckpoint(tmp_path, every_n_train_steps=5)
    trainer(max_steps=8, max_epochs=-1, enable_checkpointing=True, callbacks=[again]).fit(
        resumed, data(), ckpt_path=tmp_path / "five.ckpt", weights_only=True
    )
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_random_probes_go_on_as_if_never_stopped(tmp_path):
    def fit(epochs: int, **options) -> MongeMap:
        torch.manual_seed(0)
        # In the plane all probes agree.
        model = MongeMap(map=StructuredMap(3, hidden=(8,)), conservative_weight=1.0, optimizer=FAST)
        samples = SamplesDataModule(*gaussians(120, 3), batch_size=24, val_fraction=0.2)
        run = trainer(max_epochs=epochs)
        run.fit(model, samples, **options)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model

    whole, _ = fit(2), fit(1)
    resumed = fit(2, ckpt_path=tmp_path / "1.ckpt", weights_only=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_it_trains_on_with_nothing_else_given(tmp_path):
    options = {
        "gap_weight": Anneal(2.0, 0.5, updates=6),
        "optimizer": partial(AdamW, lr=0.01, betas=(0.5, 0.9)),
        "lr_scheduler": partial(CosineAnnealingLR, T_max=8),
        "gap_reference": gaussians(70)[0],
        "fitting_loss": "energy",
    }
    loaded = saved(small(**options), tmp_path / "map.ckpt", data(), max_steps=2, max_epochs=-1)
    assert loaded.gap_weight == options["gap_weight"]
    assert torch.equal(loaded.gap_reference, options["gap_reference"])
    assert loaded.objective.fitting_loss == "energy"
    run = trainer(max_epochs=1)
    run.fit(loaded, data())
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, AdamW)
    assert tuple(optimizer.defaults["betas"]) == (0.5, 0.9)
    assert optimizer.param_groups[0]["lr"] < 0.01


def one_of_ones_own(mapped, target):
    return (mapped.mean(0) - target.mean(0)).square().sum()


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"optimizer": lambda parameters: FAST(parameters)}, "optimizer"),
        ({"fitting_loss": one_of_ones_own}, "fitting_loss"),
        ({"gap_weight": lambda updates: 1.0}, "gap_weight"),
    ],
)
def test_functions_of_ones_own_are_asked_for_when_they_are_needed(tmp_path, options, argument):
    loaded = saved(small(**options), tmp_path / "map.ckpt", data())
    assert loaded.transport(gaussians(5)[0]).shape == (5, 2)
    with pytest.raises(MisconfigurationException, match=rf"load_from_checkpoint\(path, {argument}=\.\.\.\)"):
        trainer().fit(loaded, data())
    again = MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True, **options)
    trainer(limit_train_batches=1).fit(again, data())


def test_classes_of_strangers_are_not_imported():
    with pytest.raises(ValueError, match=r"map: 'os\.path\.join' is not of torch\.optim or lightning_gap"):
        MongeMap(map={"class_path": "os.path.join", "init_args": {}})
    with pytest.raises(ValueError, match=r"map: there is no class 'lightning_gap\.monge\.maps\.Nothing'"):
        MongeMap(map={"class_path": "lightning_gap.monge.maps.Nothing"})
    for path in ("lightning_gap.monge.checkpoint.import_module", "lightning_gap.monge.checkpoint.partial"):
        with pytest.raises(ValueError, match=rf"map: '{path}' is no class of torch\.optim or lightning_gap"):
            MongeMap(map={"class_path": path, "init_args": {"name": "this"}})


def test_a_map_on_the_sphere_trains_and_reloads(tmp_path):
    x = nn.functional.normalize(torch.randn(120, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    samples = SamplesDataModule(x, x @ turn, batch_size=30, val_fraction=0.2)
    model = MongeMap(map=SphereMap(3, hidden=(8,)), cost="geodesic", optimizer=FAST)
    loaded = saved(model, tmp_path / "map.ckpt", samples)
    mapped = loaded.transport(x)
    assert torch.equal(mapped, model.transport(x))
    torch.testing.assert_close(mapped.norm(dim=-1), torch.ones(120))


@pytest.mark.parametrize("dim", [2, None])
def test_a_map_with_an_activation_of_ones_own_is_asked_for(tmp_path, dim):
    """Another one in its place would take its weights, which have the same names and shapes."""

    def slope() -> nn.Module:
        return nn.LeakyReLU(0.5)

    model = MongeMap(dim, map=ResidualMLP(2, activation=slope), optimizer=FAST)
    with pytest.raises(MisconfigurationException, match=r"load_from_checkpoint\(path, map=\.\.\.\)"):
        saved(model, tmp_path / "map.ckpt", data())
    again = MongeMap.load_from_checkpoint(
        tmp_path / "map.ckpt", weights_only=True, map=ResidualMLP(2, activation=slope)
    )
    x = gaussians(30)[0]
    assert torch.equal(again.transport(x), model.transport(x))


def test_labels_that_mean_other_conditions_are_refused():
    three, two = ["a", "b", "c"] * 40, ["b", "c"] * 60
    model = MongeMap(hidden=(8,), optimizer=FAST)
    trainer(max_steps=1).fit(model, data(conditions=(three, three), batch_size=8))
    message = "labels of the data mean the conditions b, c, and those of this map a, b, c"
    with pytest.raises(MisconfigurationException, match=message):
        trainer().validate(model, data(conditions=(two, two), batch_size=8), verbose=False)
    first = ["a", "b"] * 60
    trainer().validate(model, data(conditions=(first, first), batch_size=8), verbose=False)
