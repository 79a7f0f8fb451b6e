"""MongeMap: trains, logs, checkpoints, resumes, maps."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from monge_runs import FAST, Metrics, fit_batch, gaussians, samples, small, trainer, weights
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from lightning_gap import MongeMap, SamplesDataModule, costs, monge_gap, sinkhorn_divergence
from lightning_gap.monge import ResidualMLP
from lightning_gap.monge.ot.terms import solve_terms

KEYS = ("loss", "sinkhorn_divergence", "monge_gap", "displacement")
SCORES = (*KEYS, "energy_distance", "wasserstein_1")


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean"])
def test_it_learns_the_map_between_gaussians(cost):
    data = samples(160, batch_size=64)
    held_out = next(iter(data.val_dataloader()))
    source, target = held_out.source, held_out.target
    model = small(cost=cost, optimizer=partial(Adam, lr=0.05))
    before = float(sinkhorn_divergence(source, target, epsilon=0.5))
    trainer(max_epochs=40, check_val_every_n_epoch=1000).fit(model, data)
    mapped = model.transport(source)
    after = float(sinkhorn_divergence(mapped, target, epsilon=0.5))
    assert after < 0.1 * before
    gap = float(monge_gap(source, mapped, cost=cost, convention="debiased", relative_epsilon=0.02))
    assert gap < 0.1 * float(costs.resolve(cost).paired(source, mapped).mean())


@pytest.mark.parametrize(("gap_weight", "optimal"), [(0.0, False), (1.0, True)])
def test_the_gap_turns_a_rotation_that_fits_into_the_map_that_is_optimal(gap_weight, optimal):
    x = gaussians(25)[0]
    x = torch.cat([x, x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])])  # a quarter turn keeps the cloud all but the same
    turn = nn.Linear(2, 2)
    with torch.no_grad():
        turn.weight.copy_(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        turn.bias.zero_()
    model = MongeMap(map=turn, gap_weight=gap_weight, optimizer=partial(Adam, lr=0.05))
    fit_batch(model, (x, x), max_epochs=50)
    mapped = model.transport(x)
    assert float(sinkhorn_divergence(mapped, x)) < 0.3
    share = float(monge_gap(x, mapped, convention="debiased") / x.square().sum(-1).mean())
    assert (share < 0.1) if optimal else (share > 1)


def test_it_learns_a_shift():
    x = gaussians(100)[0]
    model = small(hidden=(), optimizer=partial(SGD, lr=0.1), gap_weight=0.1)
    fit_batch(model, (x, x + torch.tensor([3.0, -1.0])), max_epochs=30)
    torch.testing.assert_close(model.transport(x), x + torch.tensor([3.0, -1.0]), atol=0.05, rtol=0)


def test_it_logs_its_terms():
    data = samples()
    watch = Metrics()
    run = trainer(callbacks=[watch])
    model = small()
    run.fit(model, data)
    keys = [f"train_{key}" for key in KEYS] + [f"val_{key}" for key in SCORES]
    assert {f"lightning_gap/monge/{key}" for key in keys} <= set(run.callback_metrics)
    val = {key: run.callback_metrics[f"lightning_gap/monge/val_{key}"].item() for key in KEYS}
    assert val["loss"] == pytest.approx(val["sinkhorn_divergence"] + val["monge_gap"], rel=1e-5)
    held_out = next(iter(data.val_dataloader()))
    source, target = held_out.source, held_out.target
    mapped = model.transport(source)
    divergence = float(sinkhorn_divergence(mapped, target, epsilon=float(model.fitting_epsilon)))
    assert val["sinkhorn_divergence"] == pytest.approx(divergence, rel=1e-4)
    eps = float(model.gap_epsilon)
    assert val["monge_gap"] == pytest.approx(float(monge_gap(source, mapped, epsilon=eps)), rel=1e-4)
    assert val["monge_gap"] >= eps * math.log(len(source))
    assert val["displacement"] == pytest.approx(float((mapped - source).square().sum(-1).mean()), rel=1e-5)


def test_test_loop_logs_its_terms():
    run = trainer()
    run.test(small(), samples(test_fraction=0.2), verbose=False)
    assert {f"lightning_gap/monge/test_{key}" for key in SCORES} <= set(run.callback_metrics)


def test_without_weight_the_gap_is_only_measured_in_validation(monkeypatch):
    asked = []

    def counted(fitting, regularizing, *options, **how):
        asked.append(len(regularizing))
        return solve_terms(fitting, regularizing, *options, **how)

    monkeypatch.setattr("lightning_gap.monge.objective.solve_terms", counted)
    run = trainer(num_sanity_val_steps=0)
    run.fit(small(gap_weight=0), samples())
    assert set(asked) == {0}
    assert "lightning_gap/monge/train_monge_gap" not in run.callback_metrics
    assert "lightning_gap/monge/val_monge_gap" in run.callback_metrics


def test_epsilons_are_decided_once_from_the_training_samples():
    data = samples()
    source, target = data.training_samples()
    model = small(cost="euclidean")
    assert math.isnan(model.fitting_epsilon)
    trainer(max_epochs=1).fit(model, data)
    fitting, gap = float(model.fitting_epsilon), float(model.gap_epsilon)
    assert fitting == pytest.approx(0.05 * float(torch.cdist(target, target).square().mean()), rel=1e-5)
    assert gap == pytest.approx(0.01 * float(torch.cdist(source, target).mean()), rel=1e-5)
    other = SamplesDataModule(source * 9, target * 9, batch_size=8)
    with pytest.warns(
        UserWarning, match=r"earlier fit on other samples, with its start and fitting_epsilon=0\.4.* make a "
    ):
        trainer(max_epochs=1).fit(model, other)
    assert (float(model.fitting_epsilon), float(model.gap_epsilon)) == (fitting, gap)


def test_given_epsilons_stay():
    model = small(fitting_epsilon=0.7, gap_epsilon=0.2)
    trainer(limit_train_batches=1).fit(model, samples())
    assert (float(model.fitting_epsilon), float(model.gap_epsilon)) == (pytest.approx(0.7), pytest.approx(0.2))


@pytest.mark.parametrize("dim", [2, None])
def test_a_checkpoint_reloads_with_nothing_else_given(tmp_path, dim):
    model = small(
        dim,
        cost=costs.PNorm(np.float64(1.5)),
        fitting_cost="euclidean",
        gap_weight=2,
        rho=50.0,
        solver="blocked",
    )
    run = trainer()
    run.fit(model, samples())
    run.save_checkpoint(tmp_path / "map.ckpt")
    loaded = MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True)
    x = torch.randn(50, 2)
    assert torch.equal(loaded.transport(x), model.transport(x))
    assert not torch.equal(loaded.transport(x), x)
    for name in ("cost", "fitting_cost", "gap_weight", "rho", "solver", "hidden"):
        assert getattr(loaded, name) == getattr(model, name)
    assert torch.equal(loaded.gap_epsilon, model.gap_epsilon)
    assert torch.equal(loaded.fitting_epsilon, model.fitting_epsilon)
    checkpoint = torch.load(tmp_path / "map.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["dim"] == 2
    assert plain(checkpoint["hyper_parameters"])
    assert loaded.optimizer.func is Adam
    assert loaded.optimizer.keywords == {"lr": 0.03}


def plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(plain(part) for part in value.values())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (int, float, str, bool)


def chebyshev(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().amax(-1)


@pytest.mark.parametrize("argument", ["cost", "fitting_cost"])
def test_a_cost_given_as_a_function_is_asked_for_on_reload(tmp_path, argument):
    model = small(**{argument: chebyshev})
    run = trainer(limit_train_batches=1)
    run.fit(model, samples())
    run.save_checkpoint(tmp_path / "map.ckpt")
    with pytest.raises(ValueError, match=rf"{argument}: .*callable.*load_from_checkpoint\(path, {argument}=\.\.\.\)"):
        MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True)
    loaded = MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True, **{argument: chebyshev})
    x = torch.randn(5, 2)
    assert torch.equal(loaded.transport(x), model.transport(x))


def test_a_network_of_ones_own_is_asked_for_on_reload(tmp_path):
    model = small(dim=None, map=nn.Linear(2, 2))
    run = trainer(limit_train_batches=1)
    run.fit(model, samples())
    run.save_checkpoint(tmp_path / "map.ckpt")
    with pytest.raises(MisconfigurationException, match=r"load_from_checkpoint\(path, map=\.\.\.\)"):
        MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True)
    loaded = MongeMap.load_from_checkpoint(tmp_path / "map.ckpt", weights_only=True, map=nn.Linear(2, 2))
    x = torch.randn(5, 2)
    assert torch.equal(loaded.transport(x), model.transport(x))


@pytest.mark.parametrize("dim", [2, None])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, dim):
    options = {"lr_scheduler": partial(StepLR, step_size=3, gamma=0.5)}
    whole = small(dim, **options)
    trainer(max_epochs=4).fit(whole, samples())

    first = trainer(max_epochs=2)
    first.fit(small(dim, **options), samples())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = small(dim, **options)
    trainer(max_epochs=4).fit(resumed, samples(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_the_scheduler_is_stepped_after_every_update():
    watch = Metrics()
    model = small(optimizer=partial(SGD, lr=0.125), lr_scheduler=partial(StepLR, step_size=1, gamma=0.5))
    trainer(max_epochs=2, callbacks=[watch]).fit(model, samples(batch_size=40))
    assert len(watch.lr) == 4
    assert watch.lr in ([2.0**-k for k in (3, 4, 5, 6)], [2.0**-k for k in (4, 5, 6, 7)])


def test_double_arrays_train_a_single_precision_map():
    model = small()
    source, target = gaussians(dtype=torch.float64)
    data = SamplesDataModule(source.numpy(), target.numpy(), batch_size=32)
    run = trainer()
    run.fit(model, data)
    assert model.map.displacement[0].weight.dtype == torch.float32
    assert torch.equal(torch.cat(run.predict(model, data)), model.transport(source))


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-mixed", torch.float32)])
def test_precisions_of_the_trainer(precision, dtype):
    model = small()
    run = trainer(precision=precision, max_epochs=8)
    run.fit(model, samples())
    assert {p.dtype for p in model.parameters()} == {dtype}
    reference = small()
    trainer(max_epochs=8).fit(reference, samples())
    key = "lightning_gap/monge/val_sinkhorn_divergence"
    x = torch.randn(30, 2)
    torch.testing.assert_close(model.transport(x).float(), reference.transport(x), atol=0.15, rtol=0)
    assert math.isfinite(run.callback_metrics[key])


def test_a_network_of_ones_own():
    net = nn.Linear(2, 2)
    model = MongeMap(map=net, optimizer=FAST)
    assert model.map is net
    before = net.weight.detach().clone()
    trainer(limit_train_batches=2).fit(model, samples())
    assert not torch.equal(before, net.weight)


@pytest.mark.parametrize(
    ("net", "got"),
    [
        (nn.Linear(2, 3), r"\(32, 3\)"),
        (nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)), r"\(32,\)"),
        (nn.LSTM(2, 2), "tuple"),
    ],
)
def test_a_network_that_does_not_keep_the_shape_is_refused(net, got):
    with pytest.raises(ValueError, match=rf"the map returned {got} for samples of shape \(32, 2\)"):
        trainer(num_sanity_val_steps=0).fit(MongeMap(map=net), samples())


def test_without_network_it_says_so():
    with pytest.raises(MisconfigurationException, match=r"give dim=, .* or map="):
        fit_batch(MongeMap(), gaussians(20))
    with pytest.raises(MisconfigurationException, match="no network yet"):
        MongeMap().transport(torch.zeros(3, 2))


def test_data_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match="samples have dimension 2, but the map was made with dim=3"):
        trainer().fit(small(3), samples())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gap_weight": -1}, ValueError, "gap_weight must be a finite number of at least 0, got -1"),
        ({"gap_weight": "1"}, ValueError, "gap_weight must be a finite number"),
        ({"gap_weight": True}, ValueError, "gap_weight must be a finite number"),
        ({"fitting_epsilon": 0}, ValueError, "fitting_epsilon must be a positive finite number, got 0"),
        ({"gap_epsilon": -1.0}, ValueError, "gap_epsilon must be a positive finite number, got -1.0"),
        ({"rho": math.nan}, ValueError, "rho must be a positive finite number"),
        ({"cost": "manhattan"}, ValueError, "cost: unknown cost 'manhattan'"),
        ({"cost": 3}, TypeError, "cost must be a name"),
        ({"fitting_cost": "pnorm"}, ValueError, "fitting_cost: cost 'pnorm' cannot be read"),
        ({"hidden": 64}, TypeError, "hidden must be a sequence of widths"),
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        MongeMap(**{"dim": 2, **options})


def test_a_target_without_spread_is_told_what_to_give():
    data = SamplesDataModule(torch.randn(40, 2), torch.ones(40, 2), batch_size=20)
    with pytest.raises(ValueError, match=r"fitting_epsilon cannot be decided .*fitting_epsilon="):
        trainer(num_sanity_val_steps=0).fit(small(), data)
    trainer(limit_train_batches=1).fit(small(fitting_epsilon=0.1), data)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.zeros(4, 2), ValueError, "a batch must be .* a pair .* got Tensor: use SamplesDataModule"),
        ((torch.zeros(4, 2),) * 3, ValueError, "a batch must be .* a pair"),
        ((torch.zeros(4, 2), torch.full((4, 2), math.nan)), ValueError, "target holds NaN or infinity in 4 of 4 rows"),
    ],
)
def test_bad_batches_are_refused(batch, error, message):
    with pytest.raises(error, match=message):
        fit_batch(small(), batch)


class SaveState(Callback):
    """Writes what a rank ends with, and the first batch it saw."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.batch: list[Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.batch = [part.clone() for part in batch[:2]]

    def on_train_end(self, trainer, pl_module):
        torch.save((weights(pl_module), self.batch), f"{self.folder}/{trainer.global_rank}.pt")


@pytest.mark.distributed
def test_two_processes_train_one_map(tmp_path):
    model = small(None)
    trainer(
        strategy="ddp_fork",
        devices=2,
        max_epochs=2,
        callbacks=[SaveState(str(tmp_path))],
        use_distributed_sampler=True,
    ).fit(model, samples(batch_size=16))
    (first, first_batch), (second, second_batch) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first["map.share"] >= 0
    assert first["map.started"] == 1
    for mine, other in zip(first_batch, second_batch, strict=True):
        assert len(mine) == len(other) == 16
        assert not {tuple(row) for row in mine.tolist()} & {tuple(row) for row in other.tolist()}


def test_a_residual_mlp_is_at_the_identity():
    model = MongeMap(map=ResidualMLP(2, (8, 4)))
    x = torch.randn(6, 2)
    assert torch.equal(model.transport(x), x)


def test_an_unknown_solver_is_refused_at_once():
    with pytest.raises(ValueError, match="solver must be one of"):
        MongeMap(2, solver="sinkhorn")


def test_a_solver_without_epsilon_is_refused_at_once():
    with pytest.raises(ValueError, match=r"score a trained map by monge_gap\(x, model"):
        MongeMap(2, solver="exact")
