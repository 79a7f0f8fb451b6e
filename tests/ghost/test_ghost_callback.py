import copy

import pytest
import torch
from ghost_reference import one_after_another
from ghost_runs import Net, Validated, data, ghosts, net, saving, trainer
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap.ghost import GhostBatchNorm, GhostNorm


class Late(Validated):
    """A model built in configure_model."""

    def __init__(self):
        LightningModule.__init__(self)
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = Net().net


class Witness(Callback):
    """Which layers are ghosts, at each hook that matters."""

    def __init__(self):
        self.seen = {}

    def note(self, hook, module):
        self.seen[hook] = [type(layer).__name__ for layer in module.modules() if isinstance(layer, GhostNorm)]

    def on_sanity_check_start(self, trainer, pl_module):
        self.note("sanity check", pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.note("train", pl_module)

    def on_validation_end(self, trainer, pl_module):
        self.note("validation", pl_module)


@pytest.mark.parametrize("kind", [Validated, Late])
def test_fit_trains_with_ghosts_and_hands_the_model_back(kind):
    model, witness = net(kind), Witness()
    trainer(GhostBatchNorm(4), witness, num_sanity_val_steps=1).fit(model, data(), data())
    assert set(witness.seen) == {"sanity check", "train", "validation"}
    assert all(names == ["GhostBatchNorm1d"] * 2 for names in witness.seen.values())
    assert ghosts(model) == []
    assert type(model.net[1]) is nn.BatchNorm1d
    assert int(model.net[1].num_batches_tracked) == 64 // 4


@pytest.mark.parametrize("grouping", ["contiguous", "strided"])
@pytest.mark.parametrize("running_stats", ["sequential", "per_step"])
def test_fit_equals_a_plain_loop_over_ghosts(running_stats, grouping):
    model = net().double()
    twin = copy.deepcopy(model)

    def forward(x):
        for layer in twin.net:
            options = {"grouping": grouping, "running_stats": running_stats}
            x = one_after_another(layer, x, 4, **options) if isinstance(layer, nn.BatchNorm1d) else layer(x)
        return x

    loader = DataLoader(TensorDataset(*(t.double() for t in data(n=60).dataset.tensors)), batch_size=16)
    trainer(GhostBatchNorm(4, running_stats=running_stats, grouping=grouping), max_epochs=2).fit(model, loader)
    optimizer = twin.configure_optimizers()
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(forward(x), y).backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-10, atol=1e-12)


def test_ghost_of_the_batch_size_is_a_plain_fit_bit_for_bit():
    models = [net(), net()]
    trainer(GhostBatchNorm(16)).fit(models[0], data())
    trainer().fit(models[1], data())
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name])


def test_two_fits():
    model, callback = net(), GhostBatchNorm(4)
    for fit in (1, 2):
        trainer(callback).fit(model, data())
        assert int(model.net[1].num_batches_tracked) == 16 * fit
        assert ghosts(model) == []


def test_resume_equals_an_uninterrupted_run(tmp_path):
    whole = net()
    trainer(GhostBatchNorm(4), saving(tmp_path / "whole"), max_epochs=4).fit(whole, data())
    saved = saving(tmp_path)
    trainer(GhostBatchNorm(4), saved, max_epochs=2).fit(net(), data())
    resumed = net()
    trainer(GhostBatchNorm(4), saving(tmp_path), max_epochs=4).fit(resumed, data(), ckpt_path=saved.last_model_path)
    assert int(resumed.net[1].num_batches_tracked) == 4 * 16
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


@pytest.mark.parametrize("with_callback", [True, False])
def test_checkpoints_load_with_and_without_the_callback(tmp_path, with_callback):
    saved = saving(tmp_path)
    trainer(*[GhostBatchNorm(4)] * with_callback, saved).fit(net(Validated), data(), data())
    path = saved.last_model_path
    state = torch.load(path, weights_only=True)["state_dict"]
    assert list(state) == list(net().state_dict())
    Net().load_state_dict(state, strict=True)
    model, other = net(Validated), [GhostBatchNorm(4)] * (not with_callback)
    trainer(*other, saving(tmp_path), max_epochs=2).fit(model, data(), data(), ckpt_path=path)
    assert int(model.net[1].num_batches_tracked) == 16 + 4
    trainer(*other, saving(tmp_path)).validate(model, data(), ckpt_path=path, verbose=False)
    assert ghosts(model) == []


def test_stochastic_weight_averaging_updates_statistics_over_ghosts():
    class Inputs(Callback):
        """What the first norm layer sees of all the data, with the weights of the last pass."""

        def on_train_batch_start(self, trainer, pl_module, *_):
            with torch.no_grad():
                self.mean = pl_module.net[0](data().dataset.tensors[0]).mean(0)

    model, inputs = net(), Inputs()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer(GhostBatchNorm(4), swa, inputs, max_epochs=3).fit(model, data())
    assert type(model.net[1]) is nn.BatchNorm1d
    assert int(model.net[1].num_batches_tracked) == 16  # the last pass alone, cumulatively over its ghosts
    torch.testing.assert_close(model.net[1].running_mean, inputs.mean)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_shard_by_other_means_are_refused(strategy):
    run, model = trainer(GhostBatchNorm(4)), net()
    run.strategy.__class__ = strategy  # building the real one needs CUDA or several processes
    with pytest.raises(
        MisconfigurationException, match=f"does not handle {strategy.__name__}.*strategy='ddp', ModelParallel"
    ):
        run.callbacks[0].setup(run, model, stage="fit")
    run.callbacks[0].setup(run, model, stage="validate")


def test_sync_batchnorm_is_refused_where_it_would_convert():
    callback = GhostBatchNorm(4)
    run = trainer(callback, strategy="ddp", sync_batchnorm=True)
    with pytest.raises(MisconfigurationException, match=r"sync_batchnorm=True.*sync_batchnorm=False"):
        callback.setup(run, net(), stage="fit")
    model = net()
    trainer(GhostBatchNorm(4), sync_batchnorm=True).fit(model, data())  # one device ignores it
    assert int(model.net[1].num_batches_tracked) == 16


def test_models_without_batchnorm_or_with_syncbatchnorm_are_refused():
    class Without(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

    with pytest.raises(MisconfigurationException, match="Without holds no BatchNorm layer"):
        trainer(GhostBatchNorm(4)).fit(net(Without), data())
    model = net()
    model.net[1] = nn.SyncBatchNorm(8)
    with pytest.raises(MisconfigurationException, match=r"'net.1' is a SyncBatchNorm"):
        trainer(GhostBatchNorm(4)).fit(model, data())
    assert ghosts(model) == []


def test_bad_arguments_are_refused_when_the_callback_is_made():
    with pytest.raises(TypeError, match="ghost_batch_size"):
        GhostBatchNorm(2.0)
    with pytest.raises(ValueError, match="running_stats"):
        GhostBatchNorm(4, running_stats="ema")
    with pytest.raises(ValueError, match="grouping"):
        GhostBatchNorm(4, grouping="random")
    with pytest.raises(TypeError, match="ranks_per_ghost"):
        GhostBatchNorm(4, ranks_per_ghost=2.0)
    with pytest.raises(ValueError, match="ranks_per_ghost"):
        GhostBatchNorm(4, ranks_per_ghost=0)


def test_manual_optimization_and_two_forwards():
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()

    model = net(Manual)
    trainer(GhostBatchNorm(4)).fit(model, data())
    assert int(model.net[1].num_batches_tracked) == 2 * 16


def test_mixed_precision_keeps_float32_statistics():
    model = net()
    trainer(GhostBatchNorm(4), precision="bf16-mixed").fit(model, data())
    assert model.net[1].running_mean.dtype == torch.float32
    assert int(model.net[1].num_batches_tracked) == 16


@pytest.mark.compiler
def test_a_compiled_model_trains():
    torch._dynamo.reset()
    models = [net(), net()]
    models[0].net = torch.compile(models[0].net, backend="aot_eager")
    for model in models:
        trainer(GhostBatchNorm(4)).fit(model, data())
    for compiled, eager in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    assert int(models[0].net._orig_mod[1].num_batches_tracked) == 16


class WithoutNorms(Validated):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)


def test_a_model_without_batchnorm_trains_as_it_is_where_asked():
    models = [net(WithoutNorms), net(WithoutNorms)]
    with pytest.warns(UserWarning, match=r"WithoutNorms holds no BatchNorm layer.*trains as it is") as caught:
        trainer(GhostBatchNorm(4, missing="warn", skip="stem"), max_epochs=2).fit(models[0], data(), data())
    assert len([w for w in caught if "trains as it is" in str(w.message)]) == 1
    trainer(max_epochs=2).fit(models[1], data(), data())
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(MisconfigurationException, match="or set missing='warn'"):
        trainer(GhostBatchNorm(4)).fit(net(WithoutNorms), data(), data())
    with pytest.raises(ValueError, match="missing must be one of error, warn, got 'ignore'"):
        GhostBatchNorm(4, missing="ignore")
    model = net()
    model.net[1] = nn.SyncBatchNorm(8)  # something is wrong, not missing
    with pytest.raises(MisconfigurationException, match="SyncBatchNorm"):
        trainer(GhostBatchNorm(4, missing="warn")).fit(model, data())
