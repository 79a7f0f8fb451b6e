import copy

import pytest
import torch
import yaml
from ghost_reference import one_after_another
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import LargeBatchRegime
from lightning_gap.ghost import GhostBatchNorm, GhostBatchNorm1d, GhostNorm


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)


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


def data(n=64, batch_size=16):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, n, 4, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def trainer(*callbacks, folder=None, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "callbacks": list(callbacks),
        "logger": CSVLogger(folder) if folder else False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**defaults | options)


def net(kind=Net):
    seed_everything(0, verbose=False)
    return kind()


def ghosts(module):
    return [layer for layer in module.modules() if isinstance(layer, GhostNorm)]


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


def saving(folder):
    return ModelCheckpoint(folder, save_last=True)


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


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_layers_come_back_after_an_exception(error):
    class Failing(Net):
        def on_train_batch_end(self, *_):
            raise error

    model, callback = net(Failing), GhostBatchNorm(4)
    with pytest.raises((RuntimeError, SystemExit)):
        trainer(callback).fit(model, data())
    assert ghosts(model) == []
    healthy = net()
    trainer(callback).fit(healthy, data())
    assert int(healthy.net[1].num_batches_tracked) == 16


def test_ghosts_of_the_users_own_come_back_as_they_were():
    model = net()
    model.net[1] = GhostBatchNorm1d(8, ghost_batch_size=8, running_stats="per_step")
    trainer(GhostBatchNorm(4)).fit(model, data())
    assert ghosts(model) == [model.net[1]]
    assert (model.net[1].ghost_batch_size, model.net[1].running_stats) == (8, "per_step")
    assert int(model.net[1].num_batches_tracked) == 16


def test_two_callbacks_share_a_model():
    class Sizes(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.seen = [layer.ghost_batch_size for layer in ghosts(pl_module)]

    for skips, expected in ((("net.4", "net.1"), [4, 8]), (((), "net.1"), [4, 8]), (((), ()), [8, 8])):
        model, sizes = net(), Sizes()
        trainer(GhostBatchNorm(4, skip=skips[0]), GhostBatchNorm(8, skip=skips[1]), sizes).fit(model, data())
        assert sizes.seen == expected
        assert ghosts(model) == []


def test_report_and_hyper_parameters(tmp_path, capsys):
    run = trainer(GhostBatchNorm(4, grouping="strided", skip="net.4"), folder=tmp_path)
    run.fit(net(), data())
    printed = capsys.readouterr().out
    assert printed.count("Ghost batch normalization") == 1
    assert "net.4" in printed
    with open(f"{run.logger.log_dir}/hparams.yaml") as file:
        logged = yaml.safe_load(file)
    expected = {
        "ghost_batch_size": 4, "running_stats": "sequential", "grouping": "strided",
        "converted_layers": 1, "skipped_layers": 1, "ranks_per_ghost": 1, "ghosts": "4 on each of 1 ranks",
    }  # fmt: skip
    assert logged == {f"lightning_gap/ghost/{name}": value for name, value in expected.items()}


def test_layers_that_cannot_be_converted_are_reported(capsys):
    model = net()
    plain = model.net[1].forward
    model.net[1].forward = lambda x: plain(x)
    with pytest.warns(UserWarning, match=r"leaves layer 'net.1' as it is: it has had its forward replaced"):
        trainer(GhostBatchNorm(4)).fit(model, data())
    assert int(model.net[1].num_batches_tracked) == 4
    assert int(model.net[4].num_batches_tracked) == 16


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_micro_batch_below_the_ghost_size_warns_once(accumulated):
    models = [net(), net()]
    with pytest.warns(UserWarning, match="sees 16 samples.*plain batch normalization over these 16") as caught:
        trainer(GhostBatchNorm(32), max_epochs=2, accumulate_grad_batches=accumulated).fit(models[0], data())
    assert len([w for w in caught if "ghost_batch_size=32" in str(w.message)]) == 1
    trainer(max_epochs=2, accumulate_grad_batches=accumulated).fit(models[1], data())
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name])


def test_a_batch_whose_size_is_not_known_warns_once_unless_rows_are_given():
    class Odd(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["pair"], batch_idx)

    def collate(rows):
        x, y = map(torch.stack, zip(*rows, strict=True))
        return {"pair": (x, y), "other": torch.zeros(3)}

    loader = DataLoader(data().dataset, batch_size=16, collate_fn=collate)
    with pytest.warns(UserWarning, match="samples cannot be told.*each row.*rows_per_sample") as caught:
        trainer(GhostBatchNorm(4), max_epochs=2).fit(net(Odd), loader)
    assert len([w for w in caught if "cannot be told" in str(w.message)]) == 1
    model = net(Odd)
    trainer(GhostBatchNorm(4, rows_per_sample=1)).fit(model, loader)
    assert int(model.net[1].num_batches_tracked) == 16


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


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_copy_made_in_training_is_handed_back_too(error):
    class MeanTeacher(Net):
        def on_train_start(self):
            self.teacher = copy.deepcopy(self.net)

        def training_step(self, batch, batch_idx):
            self.seen = [type(layer) for layer in self.teacher if isinstance(layer, GhostNorm)]
            self.rows = {layer.rows_per_sample for layer in (*self.teacher, *self.net) if isinstance(layer, GhostNorm)}
            if error and batch_idx == 2:
                raise error
            return super().training_step(batch, batch_idx) + self.teacher(batch[0]).mean()

    model = net(MeanTeacher)
    model.own = GhostBatchNorm1d(3, ghost_batch_size=8)  # of the user's own, and a copy of it
    model.own_copy = copy.deepcopy(model.own)
    if error:
        with pytest.raises(error):
            trainer(GhostBatchNorm(4)).fit(model, data())
    else:
        trainer(GhostBatchNorm(4)).fit(model, data())
        assert int(model.teacher[1].num_batches_tracked) == 16
    assert model.seen == [GhostBatchNorm1d] * 2
    assert len(model.rows) == 1  # it counts the samples of the same batch
    assert ghosts(model) == [model.own, model.own_copy]
    assert [type(model.teacher[i]) for i in (1, 4)] == [nn.BatchNorm1d] * 2


def test_layers_added_in_training_become_ghosts_at_the_next_epoch():
    class Growing(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net.append(nn.BatchNorm1d(4))
                self.other = nn.BatchNorm1d(4)

    model = net(Growing)
    trainer(GhostBatchNorm(4, skip="net.4"), max_epochs=3).fit(model, data())
    assert ghosts(model) == []
    assert int(model.net[5].num_batches_tracked) == 4 + 16  # plain for an epoch
    assert int(model.net[4].num_batches_tracked) == 3 * 4  # held back

    class Unfit(Growing):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.other = nn.SyncBatchNorm(4)

    with pytest.warns(UserWarning, match="added during training as it is: layer 'other' is a SyncBatchNorm") as caught:
        trainer(GhostBatchNorm(4), max_epochs=4).fit(net(Unfit), data())
    assert len([w for w in caught if "added during training" in str(w.message)]) == 1


@pytest.mark.parametrize(("reference", "said"), [(4, False), (8, True)])
def test_a_reference_run_of_another_batch_is_said(reference, said, capsys):
    class Decaying(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer(LargeBatchRegime(reference, train_longer=False), GhostBatchNorm(4)).fit(net(Decaying), data())
    printed = " ".join(capsys.readouterr().out.split())
    assert ("reference run of LargeBatchRegime has 8 samples a batch, a ghost 4" in printed) == said
