"""What a MongeMap takes where it was not told: map, loss, weight and rate, and that its checkpoints keep them."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from monge_runs import Metrics, gaussians, samples, trainer, weights
from torch.optim import SGD, Adam

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.monge import BrenierMap, ConditionalMap, ResidualMLP, SphereMap, defaults
from lightning_gap.monge.checkpoint import described_map

SMALL = {"hidden": (8,)}


def terms(model: MongeMap) -> tuple[object, object, bool]:
    return model.objective.fitting_loss, model.gap_weight, model.decays


@pytest.mark.parametrize(
    ("dim", "options", "kind", "start", "expected"),
    [
        (2, {}, BrenierMap, "plan", ("semidual", 0.0, True)),
        (128, {}, BrenierMap, "plan", ("semidual", 0.0, True)),
        (129, {}, ResidualMLP, "gaussian", ("energy", 0.1, True)),
        (2, {"cost": "euclidean"}, ResidualMLP, "plan", ("energy", 0.1, True)),
        (2, {"hidden": ()}, ResidualMLP, "plan", ("energy", 0.1, True)),
        (2, {"fitting_epsilon": 0.5}, BrenierMap, "plan", ("sinkhorn", 0.0, True)),
        (2, {"fitting_cost": "euclidean"}, BrenierMap, "plan", ("sinkhorn", 0.0, True)),
        (2, {"rho": 1.0}, BrenierMap, "plan", ("sinkhorn", 0.0, True)),
        (2, {"gap_reference": [[0.0, 1.0]]}, BrenierMap, "plan", ("semidual", 0.1, True)),
        (2, {"optimizer": partial(SGD, lr=0.1)}, BrenierMap, "plan", ("semidual", 0.0, False)),
        (2, {"fitting_loss": "energy", "gap_weight": 2.0}, BrenierMap, "plan", ("energy", 2.0, True)),
        (2, {"map": ResidualMLP(2)}, ResidualMLP, "identity", ("sinkhorn", 1.0, False)),
        (2, {"map": ResidualMLP(2, start="plan")}, ResidualMLP, "plan", ("energy", 0.1, True)),
        (2, {"map": BrenierMap(2, (4,))}, BrenierMap, "plan", ("semidual", 0.0, True)),
    ],
)
def test_what_is_taken_follows_cost_dimension_and_arguments(dim, options, kind, start, expected):
    model = MongeMap(dim, **options)
    assert type(model.map) is kind
    assert model.map.starts_at == start
    assert terms(model) == expected
    assert model.hparams["fitting_loss"] == expected[0]
    assert model.hparams["gap_weight"] == expected[1]


def test_on_the_sphere_it_is_a_map_of_the_sphere():
    net = MongeMap(3, cost="geodesic").map
    assert isinstance(net, SphereMap)
    assert net.starts_at == "plan"


@pytest.mark.parametrize(("options", "kind"), [({}, BrenierMap), ({"cost": "euclidean"}, ResidualMLP)])
def test_data_choose_as_the_dimension_does_and_it_is_said_once(options, kind, monkeypatch):
    heard = []
    monkeypatch.setattr("lightning_gap.monge.defaults.rank_zero_info", heard.append)
    model = MongeMap(**SMALL, **options)
    assert model.map is None
    trainer(max_steps=1).fit(model, samples())
    assert type(model.map) is kind
    assert terms(model) == terms(MongeMap(2, **SMALL, **options))
    assert model.hparams["map"] == described_map(model.map)
    said = [message for message in heard if "MongeMap chose" in message]
    assert len(said) == 1
    for part in (kind.__name__, "2 dimensions", repr(model.objective.fitting_loss), "gap_weight=", "give map="):
        assert part in said[0]


@pytest.mark.parametrize("dim", [None, 2])
def test_conditions_choose_a_conditional_map(dim):
    labels = ["a", "b"] * 60
    model = MongeMap(dim, **SMALL)
    trainer(max_steps=1).fit(model, samples(conditions=(labels, labels), batch_size=10))
    assert type(model.map) is ConditionalMap
    assert model.map.num_conditions == 2
    loss, weight = terms(model)[:2]
    assert loss == "energy"
    assert 0 < weight < 0.1  # mean distances for each mean cost: at this scale less


@pytest.mark.parametrize("dim", [None, 2])
def test_a_checkpoint_makes_the_same_map_and_trains_it_the_same(tmp_path, dim):
    model = MongeMap(dim, **SMALL)
    run = trainer(max_steps=1)
    run.fit(model, samples())
    run.save_checkpoint(tmp_path / "map.ckpt")
    loaded = MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True)
    assert terms(loaded) == terms(model)
    assert loaded.map.hparams == model.map.hparams
    x = gaussians(9)[0]
    assert torch.equal(loaded.transport(x), model.transport(x))


class Saves(Callback):
    """Saves a checkpoint after some updates."""

    def __init__(self, path: Path, updates: int) -> None:
        self.path, self.updates = path, updates

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.updates:
            trainer.save_checkpoint(self.path)


def test_a_resumed_default_equals_an_uninterrupted_one(tmp_path):
    whole, path = MongeMap(**SMALL), tmp_path / "half.ckpt"
    trainer(max_steps=4, max_epochs=-1, callbacks=[Saves(path, 2)]).fit(whole, samples(160))
    for resumed in (MongeMap(**SMALL), MongeMap.load_from_checkpoint(path, weights_only=True)):
        trainer(max_steps=4, max_epochs=-1).fit(resumed, samples(160), ckpt_path=path, weights_only=True)
        for name, value in weights(whole).items():
            assert torch.equal(value, weights(resumed)[name]), name


def test_a_default_of_older_versions_is_loaded_and_goes_on_as_it_was(tmp_path):
    """Their checkpoints describe no map that was made for a dimension: it was a residual network at the identity."""
    older = MongeMap(2, map=ResidualMLP(2, (8,)), hidden=(8,))
    run, path = trainer(max_steps=1), tmp_path / "older.ckpt"
    run.fit(older, samples())
    run.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["map"] = None
    torch.save(checkpoint, path)
    loaded = MongeMap.load_from_checkpoint(path, weights_only=True)
    resumed = MongeMap(2, **SMALL)
    trainer(max_steps=2, max_epochs=-1).fit(resumed, samples(), ckpt_path=path, weights_only=True)
    for model in (loaded, resumed):
        assert type(model.map) is ResidualMLP
        assert terms(model) == ("sinkhorn", 1.0, False)
    x = gaussians(9)[0]
    assert torch.equal(loaded.transport(x), older.transport(x))


@pytest.mark.parametrize(
    ("loss", "updates", "epochs", "end"),
    [
        ("energy", 0, 4, 4),
        ("energy", 0, 40, 21),
        ("energy", 30, 50, 30),
        ("energy", 500, 50, 41),
        ("semidual", 500, 40, 21),
    ],
)
def test_the_rate_decays_along_a_cosine_over_the_run_and_at_most_twenty_passes(loss, updates, epochs, end, monkeypatch):
    """Or as many updates as there are samples, up to a number, but for the semi-dual."""
    monkeypatch.setattr(defaults, "_UPDATES", updates)
    net = ResidualMLP(2, (4,), start="mean") if loss == "energy" else BrenierMap(2, (4,), start="gaussian")
    options = {"map": net, "fitting_loss": loss, "gap_weight": 0.0}
    watch, model = Metrics(), MongeMap(**options)
    model.decays = True
    data = SamplesDataModule(*gaussians(45), batch_size=40)  # 41 are trained on, by an update an epoch
    trainer(max_epochs=epochs, limit_val_batches=0, callbacks=[watch]).fit(model, data)
    assert watch.lr[0] <= 1e-3
    assert watch.lr == sorted(watch.lr, reverse=True)
    last = end * len(watch.lr) // epochs
    assert watch.lr[last // 2 - 1] == pytest.approx(5e-4, rel=0.4)
    assert max(watch.lr[last:], default=0.0) == pytest.approx(0, abs=1e-4)


def test_a_scheduler_or_an_optimizer_that_is_given_is_kept():
    model = MongeMap(2, optimizer=partial(Adam, lr=0.5), **SMALL)
    watch = Metrics()
    trainer(max_steps=2, max_epochs=-1, callbacks=[watch]).fit(model, samples())
    assert watch.lr == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden": 64}, TypeError, "hidden must be a sequence of widths, got 64"),
        ({"hidden": (0,)}, ValueError, "a width of hidden must be at least 1"),
        ({"hidden": "8"}, TypeError, "hidden must be a sequence of widths"),
    ],
)
def test_bad_widths_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        MongeMap(2, **options)


def test_what_no_problem_was_solved_for_is_not_logged():
    watch = Metrics()
    trainer(max_steps=1, callbacks=[watch]).fit(MongeMap(2, **SMALL), samples())
    assert "train_marginal_error" not in watch.train[0]
    assert "train_semidual" in watch.train[0]
