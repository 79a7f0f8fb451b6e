import csv
import math
import warnings

import matplotlib.figure
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import GhostBatchNorm, GradientNoiseScale, LargeBatchRegime
from lightning_gap.diffusion import (
    UltraSlowDiffusion,
    WeightDistance,
    estimate_alpha,
    fit_diffusion,
    forecast_updates,
    norms_and_biases,
    read_reference,
    tracked_parameters,
    weight_displacement,
)

KEY = "lightning_gap/diffusion/"


class Net(LightningModule):
    """Dropout and shuffling use the RNG, BatchNorm keeps statistics: an observer that disturbs any of them shows."""

    def __init__(self, lr=0.05, milestones=()):
        super().__init__()
        self.lr, self.milestones = lr, list(milestones)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.milestones, gamma=0.1)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Reference(Callback):
    """The slow obvious twin: copy all weights after every update, subtract in float64."""

    def __init__(self):
        self.start, self.distances = None, {}

    @staticmethod
    def vector(module):
        return torch.cat([p.detach().double().flatten() for p in module.parameters()])

    def on_train_start(self, trainer, pl_module):
        if self.start is None:
            self.start = self.vector(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.distances[trainer.global_step] = (self.vector(pl_module) - self.start).norm().item()


def loader(batch_size=8, n=80, shuffle=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=batch_size, shuffle=shuffle)


def trainer(tmp_path, callbacks, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "max_epochs": 12,
        "num_sanity_val_steps": 1,
    }
    return Trainer(callbacks=callbacks, **(defaults | kwargs))


def fit(tmp_path, *callbacks, model=None, data=None, ckpt_path=None, validate=False, **kwargs):
    torch.manual_seed(1)
    model = Net() if model is None else model
    run = trainer(tmp_path, list(callbacks), limit_val_batches=1.0 if validate else 0, **kwargs)
    run.fit(model, data or loader(), loader(shuffle=False), ckpt_path=ckpt_path)
    return run, model


def test_distances_are_those_of_the_slow_twin_on_the_log_grid(tmp_path):
    diffusion, reference = UltraSlowDiffusion(points_per_decade=5), Reference()
    fit(tmp_path, diffusion, reference)
    trace = diffusion.trace
    assert trace["updates"] == [1, 2, 3, 4, 6, 10, 16, 25, 40, 63, 100]
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-6)
    assert trace["learning_rate"] == [0.05] * 11
    assert {len(values) for values in trace.values()} == {11}
    start = reference.start.norm().item()
    assert trace["relative_distance"] == pytest.approx([d / start for d in trace["distance"]], rel=1e-6)


def test_every_n_updates(tmp_path):
    diffusion = UltraSlowDiffusion(every_n_updates=25)
    fit(tmp_path, diffusion)
    assert diffusion.trace["updates"] == [25, 50, 75, 100]


def test_accumulation_counts_updates_not_batches(tmp_path):
    diffusion, reference = UltraSlowDiffusion(points_per_decade=3), Reference()
    fit(tmp_path, diffusion, reference, accumulate_grad_batches=4, max_epochs=4)
    trace = diffusion.trace
    assert trace["updates"] == [1, 2, 5, 10]  # 10 batches an epoch make 3 updates
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_run_is_bit_equal_with_and_without(tmp_path, precision):
    results = []
    for callbacks in ([], [UltraSlowDiffusion()]):
        run, model = fit(tmp_path, *callbacks, precision=precision, validate=True, max_epochs=3)
        metrics = {k: v for k, v in run.callback_metrics.items() if not k.startswith(KEY)}
        results.append((model.state_dict(), run.optimizers[0].state_dict(), metrics, torch.get_rng_state()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_latest_point_is_in_callback_metrics(tmp_path):
    diffusion = UltraSlowDiffusion()
    run, _ = fit(tmp_path, diffusion)
    assert float(run.callback_metrics[KEY + "distance"]) == pytest.approx(diffusion.trace["distance"][-1])
    assert float(run.callback_metrics[KEY + "updates"]) == diffusion.trace["updates"][-1]


def test_every_point_reaches_the_loggers_at_the_step_of_self_log(tmp_path):
    diffusion = UltraSlowDiffusion(points_per_decade=5)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(tmp_path, diffusion, logger=logger, log_every_n_steps=50)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    points = [row for row in rows if row[KEY + "distance"]]
    assert [float(row[KEY + "updates"]) for row in points] == diffusion.trace["updates"]
    assert [float(row[KEY + "distance"]) for row in points] == pytest.approx(diffusion.trace["distance"])
    assert [float(row[KEY + "log_updates"]) for row in points] == pytest.approx(
        [math.log(t) for t in diffusion.trace["updates"]]
    )
    assert [int(row["step"]) + 1 for row in points] == diffusion.trace["updates"]
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)
    final = [row for row in rows if row[KEY + "log_slope"]]
    assert len(final) == 1
    assert float(final[0][KEY + "log_slope"]) == pytest.approx(diffusion.diffusion_fit.log_slope)
    assert float(final[0][KEY + "log_r2"]) == pytest.approx(diffusion.diffusion_fit.log_r2)


def test_summary_says_both_laws(tmp_path, capsys):
    diffusion = UltraSlowDiffusion()
    fit(tmp_path, diffusion)
    printed, law = capsys.readouterr().out, diffusion.diffusion_fit
    assert f"{law.log_slope:.4g}·log t" in printed
    assert f"{law.power_r2:.4f}" in printed
    assert f"preferred: {'ultra-slow' if law.preferred == 'log' else 'power'}" in printed
    assert law == fit_diffusion(diffusion.trace["updates"], diffusion.trace["distance"])


def test_short_run_says_so_and_does_not_crash(tmp_path, capsys):
    diffusion = UltraSlowDiffusion()
    fit(tmp_path, diffusion, max_epochs=1)
    assert diffusion.diffusion_fit is None
    assert "no law fitted" in capsys.readouterr().out


def test_fit_takes_the_constant_stretch_of_the_learning_rate(tmp_path, capsys):
    diffusion = UltraSlowDiffusion()
    fit(tmp_path, diffusion, model=Net(milestones=[102]), max_epochs=20)
    trace = diffusion.trace
    high = [i for i, rate in enumerate(trace["learning_rate"]) if rate == 0.05]
    assert trace["updates"][high[-1]] == 100
    assert trace["learning_rate"][-1] == pytest.approx(0.005)
    expected = fit_diffusion([trace["updates"][i] for i in high], [trace["distance"][i] for i in high])
    assert diffusion.diffusion_fit == expected
    assert "constant learning rate" in " ".join(capsys.readouterr().out.split())


def test_learning_rate_is_that_of_the_update_itself(tmp_path):
    diffusion = UltraSlowDiffusion(every_n_updates=1)
    fit(tmp_path, diffusion, model=Net(milestones=[3]), max_epochs=1)
    assert diffusion.trace["learning_rate"][:5] == pytest.approx([0.05, 0.05, 0.05, 0.005, 0.005])


def test_whole_trace_is_fitted_and_said_where_the_rate_always_varies(tmp_path, capsys):
    diffusion = UltraSlowDiffusion()
    fit(tmp_path, diffusion, model=Net(milestones=[20, 40, 60]))
    assert diffusion.diffusion_fit.points == len(diffusion.trace["updates"])
    assert "the learning rate varied" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("stop", [1, 13, 64])
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")  # all its batches are one and the same
def test_resume_equals_the_uninterrupted_run(tmp_path, stop):
    batch = next(iter(loader(shuffle=False)))
    data = DataLoader(TensorDataset(*(x.repeat(10, 1) for x in batch)), batch_size=8)

    class Saver(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")
                torch.save(torch.get_rng_state(), tmp_path / "rng")

    whole = UltraSlowDiffusion(points_per_decade=10)
    _, model = fit(tmp_path, whole, Saver(), data=data, max_steps=120, max_epochs=-1)

    class Restorer(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == stop:
                torch.set_rng_state(torch.load(tmp_path / "rng"))

    resumed = UltraSlowDiffusion(points_per_decade=10)
    _, again = fit(
        tmp_path,
        resumed,
        Restorer(),
        data=data,
        max_steps=120,
        max_epochs=-1,
        ckpt_path=tmp_path / "stop.ckpt",
    )
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert resumed.trace == whole.trace
    assert resumed.diffusion_fit == whole.diffusion_fit


def test_second_fit_continues_and_a_new_run_starts_anew(tmp_path):
    diffusion, reference = UltraSlowDiffusion(points_per_decade=5), Reference()
    run, model = fit(tmp_path, diffusion, reference, max_epochs=2)
    run.fit_loop.max_epochs = 4
    run.fit(model, loader(), loader(shuffle=False))
    assert diffusion.trace["updates"] == [1, 2, 3, 4, 6, 10, 16, 25, 40]
    assert diffusion.trace["distance"][-1] == pytest.approx(reference.distances[40], rel=1e-6)
    fit(tmp_path, diffusion, max_epochs=1)
    assert diffusion.trace["updates"] == [1, 2, 3, 4, 6, 10]


def test_added_on_resume_records_nothing_and_says_so(tmp_path):
    run, _ = fit(tmp_path, max_epochs=1)
    run.save_checkpoint(tmp_path / "plain.ckpt")
    diffusion = UltraSlowDiffusion()
    with pytest.warns(UserWarning, match="added after 10 updates.*nothing is recorded"):
        fit(tmp_path, diffusion, max_epochs=2, ckpt_path=tmp_path / "plain.ckpt")
    assert diffusion.trace["updates"] == []
    assert diffusion.state_dict() == {}


def test_anchor_of_another_model_is_refused(tmp_path):
    diffusion = UltraSlowDiffusion()
    run, _ = fit(tmp_path, diffusion, max_epochs=1)
    other = Net()
    other.net[4] = nn.Linear(8, 1, bias=False)
    run.fit_loop.max_epochs = 2
    with pytest.raises(MisconfigurationException, match=r"another model.*net\.4\.bias"):
        run.fit(other, loader(), loader(shuffle=False))


def test_averaged_weights_in_validation_do_not_disturb(tmp_path):
    plain, averaged = UltraSlowDiffusion(), UltraSlowDiffusion()
    fit(tmp_path, plain, validate=True, max_epochs=4)
    fit(tmp_path, EMAWeightAveraging(decay=0.5), averaged, validate=True, max_epochs=4)
    assert averaged.trace == plain.trace


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


def test_parameters_unfrozen_later_are_left_out_with_one_warning(tmp_path):
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[0].requires_grad_(trainer.current_epoch > 0)

    model = Net()
    model.net[0].requires_grad_(False)
    diffusion = UltraSlowDiffusion()
    with pytest.warns(UserWarning, match=r"leaves out 2 parameters.*net\.0\.weight") as caught:
        fit(tmp_path, Unfreeze(), diffusion, model=model, max_epochs=3)
    assert len([w for w in caught if "leaves out" in str(w.message)]) == 1
    assert "net.0.weight" not in diffusion.state_dict()["anchor"]


def test_parameters_that_vanish_stop_the_recording_not_the_run(tmp_path):
    class Cut(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[4].bias = None

    diffusion = UltraSlowDiffusion()
    with pytest.warns(UserWarning, match=r"stops recording at update 11.*net\.4\.bias"):
        run, _ = fit(tmp_path, Cut(), diffusion, max_epochs=3)
    assert run.global_step == 30
    assert diffusion.trace["updates"] == list(range(1, 11))


def test_two_optimizers_count_optimizer_steps(tmp_path):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            x, y = batch
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(self.net(x), y))
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.net[0].parameters(), 0.03), torch.optim.SGD(self.net[4].parameters(), 0.01)

    diffusion, reference = UltraSlowDiffusion(points_per_decade=5), Reference()
    fit(tmp_path, diffusion, reference, model=Two(), max_epochs=1)
    trace = diffusion.trace
    assert trace["updates"] == [2, 4, 6, 10, 16]
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-6)
    assert trace["learning_rate"] == [0.03] * 5


def test_learning_rate_finder_leaves_the_anchor_to_the_run(tmp_path):
    diffusion, reference = UltraSlowDiffusion(points_per_decade=5), Reference()
    finder = LearningRateFinder(num_training_steps=20, update_attr=False)
    fit(tmp_path, finder, diffusion, reference, max_epochs=2, enable_checkpointing=True)
    trace = diffusion.trace
    assert trace["updates"] == [1, 2, 3, 4, 6, 10, 16]
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-6)


def test_state_is_one_copy_and_loads_with_weights_only(tmp_path):
    diffusion = UltraSlowDiffusion()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    _, model = fit(tmp_path, diffusion, checkpoint, max_epochs=1, enable_checkpointing=True)
    saved = torch.load(checkpoint.last_model_path, weights_only=True)["callbacks"]["UltraSlowDiffusion"]
    assert sum(t.numel() for t in saved["anchor"].values()) == sum(p.numel() for p in model.parameters())
    assert saved["trace"] == diffusion.trace


def test_evaluating_an_older_checkpoint_leaves_the_trace_alone(tmp_path):
    diffusion = UltraSlowDiffusion()
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    run, model = fit(tmp_path, diffusion, checkpoint, max_epochs=3, enable_checkpointing=True)
    before = diffusion.trace
    run.limit_val_batches = 1.0
    run.validate(model, loader(shuffle=False), ckpt_path=tmp_path / "step=10.ckpt", verbose=False)
    assert diffusion.trace == before


def test_fast_dev_run(tmp_path):
    diffusion = UltraSlowDiffusion()
    fit(tmp_path, diffusion, fast_dev_run=True, logger=None)
    assert diffusion.trace["updates"] == [1]


def test_nothing_to_track_is_refused(tmp_path):
    model = Net()
    model.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match="no parameter with requires_grad=True"):
        fit(tmp_path, UltraSlowDiffusion(), model=model)


def test_unknown_strategies_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_gap.diffusion.callback.holds_whole_weights", lambda trainer: False)
    with pytest.raises(MisconfigurationException, match="under strategy=SingleDeviceStrategy"):
        fit(tmp_path, UltraSlowDiffusion())


@pytest.mark.parametrize("name", ["points_per_decade", "every_n_updates"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "5"])
def test_arguments_must_be_positive_integers(name, value):
    wrong = "at least 1" if type(value) is int else "an int"
    with pytest.raises((TypeError, ValueError), match=f"{name} must be {wrong}, got {value!r}"):
        UltraSlowDiffusion(**{name: value})


class Weights(Callback):
    """All weights after every update, in float64."""

    def __init__(self):
        self.after = {}

    @staticmethod
    def copy(module):
        return {name: p.detach().double().clone() for name, p in module.named_parameters()}

    def on_train_start(self, trainer, pl_module):
        self.after.setdefault(trainer.global_step, self.copy(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after[trainer.global_step] = self.copy(pl_module)

    def displacement(self, t, *names):
        return weight_displacement(*({name: self.after[u][name] for name in names} for u in (t, 0)))


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": "("}, "exclude='\\(' is not a regular expression"),
        ({"groups": {"a": 3}}, r"groups\['a'\] must be a regular expression or a function"),
        ({"anchor_dtype": "float8"}, "anchor_dtype must be 'float16', 'bfloat16' or None, got 'float8'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UltraSlowDiffusion(**arguments)


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


def saver(path, step):
    class Saver(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == step:
                trainer.save_checkpoint(path)

    return Saver()


@pytest.mark.parametrize("options", [{"per_layer": True}, {"anchor_dtype": "float16"}, {"exclude": "bias"}])
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_resume_with_options_equals_the_uninterrupted_run(tmp_path, options):
    def run(*callbacks, **kwargs):
        torch.manual_seed(0)
        net = Net()
        net.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))  # no random numbers after the first
        fit(tmp_path, *callbacks, model=net, data=loader(n=8, shuffle=False), max_steps=120, max_epochs=-1, **kwargs)

    whole, resumed = UltraSlowDiffusion(**options), UltraSlowDiffusion(**options)
    run(whole, saver(tmp_path / "stop.ckpt", 33))
    run(resumed, ckpt_path=tmp_path / "stop.ckpt")
    assert len(whole.trace["updates"]) > 30
    assert resumed.trace == whole.trace
    assert resumed.diffusion_fit == whole.diffusion_fit


@pytest.mark.parametrize(("before", "after"), [(None, "float16"), ("float16", None)])
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_another_anchor_dtype_on_resume(tmp_path, before, after):
    def run(diffusion, *callbacks, **kwargs):
        torch.manual_seed(0)
        net = Net()
        net.net = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 1))
        fit(tmp_path, diffusion, *callbacks, model=net, data=loader(n=8, shuffle=False), max_epochs=40, **kwargs)
        return diffusion.trace

    exact = run(UltraSlowDiffusion())
    run(UltraSlowDiffusion(anchor_dtype=before), saver(tmp_path / "stop.ckpt", 20))
    resumed = run(UltraSlowDiffusion(anchor_dtype=after), ckpt_path=tmp_path / "stop.ckpt")
    assert resumed["updates"] == exact["updates"]
    assert resumed["distance"][5:] == pytest.approx(exact["distance"][5:], rel=1e-4)


def test_group_named_as_a_layer_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"'net\.0' is the name of a layer and one of `groups`"):
        fit(tmp_path, UltraSlowDiffusion(per_layer=True, groups={"net.0": "bias"}))


def test_another_exclude_on_resume_is_refused(tmp_path):
    fit(tmp_path, UltraSlowDiffusion(), saver(tmp_path / "stop.ckpt", 3), max_epochs=1)
    with pytest.raises(MisconfigurationException, match=r"net\.0\.bias is excluded now.*same `exclude`"):
        fit(tmp_path, UltraSlowDiffusion(exclude="bias"), max_epochs=2, ckpt_path=tmp_path / "stop.ckpt")


def test_new_group_on_resume_starts_there(tmp_path):
    fit(tmp_path, UltraSlowDiffusion(), saver(tmp_path / "stop.ckpt", 10), max_epochs=1)
    diffusion = UltraSlowDiffusion(groups={"head": r"^net\.4"})
    fit(tmp_path, diffusion, max_epochs=2, ckpt_path=tmp_path / "stop.ckpt")
    known = [not math.isnan(x) for x in diffusion.trace["distance/head"]]
    assert known == [t > 10 for t in diffusion.trace["updates"]]


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_csv_is_beside_the_checkpoints(tmp_path):
    diffusion = UltraSlowDiffusion(groups={"head": r"^net\.4"})
    checkpoint = ModelCheckpoint(tmp_path / "run", save_last=True)
    fit(tmp_path, diffusion, checkpoint, max_epochs=2, enable_checkpointing=True)
    rows = read_csv(tmp_path / "run" / "diffusion.csv")
    for name, values in diffusion.trace.items():
        assert [float(row[name]) for row in rows] == values
    assert {row["parameters"] for row in rows} == {str(sum(p.numel() for p in Net().parameters()))}
    fit(tmp_path, UltraSlowDiffusion(), checkpoint, max_epochs=1, enable_checkpointing=True)
    assert len(read_csv(tmp_path / "run" / "diffusion-v1.csv")) == 10
    assert len(read_csv(tmp_path / "run" / "diffusion.csv")) == len(rows)


def test_resumed_run_goes_on_in_the_same_csv(tmp_path):
    checkpoint = lambda: ModelCheckpoint(tmp_path / "run", save_last=True)  # noqa: E731
    fit(tmp_path, UltraSlowDiffusion(), checkpoint(), max_epochs=1, enable_checkpointing=True)
    diffusion = UltraSlowDiffusion()
    last = tmp_path / "run" / "last.ckpt"
    fit(tmp_path, diffusion, checkpoint(), max_epochs=3, enable_checkpointing=True, ckpt_path=last)
    assert [float(row["updates"]) for row in read_csv(tmp_path / "run" / "diffusion.csv")] == diffusion.trace["updates"]
    assert diffusion.trace["updates"][-1] == 28
    assert not (tmp_path / "run" / "diffusion-v1.csv").exists()


def test_csv_is_in_the_log_folder_or_nowhere(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, UltraSlowDiffusion(), logger=logger, max_epochs=1)
    assert len(read_csv(f"{logger.log_dir}/diffusion.csv")) == 10
    fit(tmp_path / "nothing", UltraSlowDiffusion(), max_epochs=1)
    assert not list((tmp_path / "nothing").rglob("*"))


def test_csv_outlives_a_crash(tmp_path):
    class Crash(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 7:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, UltraSlowDiffusion(), Crash(), logger=CSVLogger(tmp_path))
    assert len(read_csv(next(tmp_path.rglob("diffusion.csv")))) == 7


@pytest.fixture
def small_batch_run(tmp_path):
    """A run of 300 updates that travels as 1 + 0.5·log t, twice as fast as the ones below, and then drops its rate."""
    path = tmp_path / "small" / "diffusion.csv"
    path.parent.mkdir()
    lines = [f"{t},{0.1 if t <= 200 else 0.01},{1 + 0.5 * math.log(t)},33\n" for t in range(1, 301)]
    path.write_text("updates,learning_rate,distance,parameters\n" + "".join(lines))
    return path.parent


class Walk(LightningModule):
    """One weight that the optimizer moves along a + b·log t."""

    def __init__(self, intercept=0.5, slope=0.25):
        super().__init__()
        self.automatic_optimization = False
        self.intercept, self.slope = intercept, slope
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.weight.grad = self.weight.detach() - (self.intercept + self.slope * math.log(self.global_step + 1))
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_reference_is_laid_over_each_point(tmp_path, small_batch_run, capsys):
    diffusion, logger = UltraSlowDiffusion(reference=str(small_batch_run)), CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="measures 1 parameters here, and measured 33 in its reference"):
        run, _ = fit(tmp_path, diffusion, model=Walk(), logger=logger, max_steps=1000, max_epochs=-1)
    rows = {
        float(row[KEY + "updates"]): row for row in read_csv(f"{logger.log_dir}/metrics.csv") if row[KEY + "updates"]
    }
    assert float(rows[100][KEY + "reference_distance"]) == pytest.approx(1 + 0.5 * math.log(100))
    assert rows[501][KEY + "reference_distance"] == ""  # it had ended
    # 1 + 0.5·log u = 0.5 + 0.25·log t
    assert float(rows[1000][KEY + "reference_update"]) == pytest.approx(math.exp(0.5 * math.log(1000) - 1), rel=0.02)
    # The reference stood at 1 + 0.5·log 200 when it dropped its rate: t = exp((0.5 + 0.5·log 200) / 0.25)
    needed = math.exp((0.5 + 0.5 * math.log(200)) / 0.25)
    assert float(rows[1000][KEY + "remaining_updates"]) == pytest.approx(needed - 1000, rel=1e-3)
    assert rows[79][KEY + "remaining_updates"] == ""  # under two decades
    assert KEY + "remaining_updates" in run.progress_bar_metrics
    printed = " ".join(capsys.readouterr().out.split())
    assert diffusion.advice in printed
    assert f"keep this learning rate for {needed - 1000:.0f} more updates" in printed


def test_forecast_is_that_of_the_function_on_the_whole_trace(tmp_path, small_batch_run):
    class Noisy(Walk):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.weight += 0.02 * math.sin(7 * self.global_step)

    diffusion = UltraSlowDiffusion(reference=str(small_batch_run / "diffusion.csv"))
    with pytest.warns(UserWarning, match="measured 33 in its reference"):
        run, _ = fit(tmp_path, diffusion, model=Noisy(), max_steps=1000, max_epochs=-1)
    trace = diffusion.trace
    forecast = forecast_updates(trace["updates"], trace["distance"], 1 + 0.5 * math.log(200), resamples=199)
    seen = [float(run.callback_metrics[KEY + f"remaining_updates{end}"]) for end in ("", "_low", "_high")]
    assert seen == pytest.approx([t - 1000 for t in forecast], rel=1e-5)
    assert seen[1] < seen[0] < seen[2]


def test_a_finished_run_is_a_reference(tmp_path):
    first = UltraSlowDiffusion()
    fit(tmp_path, first, logger=CSVLogger(tmp_path / "small"))
    assert list(read_reference(str(tmp_path / "small")).distances) == first.trace["distance"]
    second = UltraSlowDiffusion(reference=str(tmp_path / "small"))
    run, _ = fit(tmp_path, second)
    assert "is reached" in second.advice  # the same run again
    assert float(run.callback_metrics[KEY + "reference_distance"]) == pytest.approx(first.trace["distance"][-1])


def test_reference_that_is_not_there_is_refused_before_training(tmp_path):
    model = Net()
    with pytest.raises(MisconfigurationException, match="does not exist: name a diffusion"):
        fit(tmp_path, UltraSlowDiffusion(reference=str(tmp_path / "none")), model=model)
    assert model._trainer is None or model.trainer.global_step == 0


def test_tensorboard_gets_a_figure_and_a_table(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, UltraSlowDiffusion(), logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    assert KEY + "figure" in events.Tags()["images"]
    assert KEY + "trace/text_summary" in events.Tags()["tensors"]


def test_wandb_gets_axes_a_figure_and_a_table(tmp_path):
    pytest.importorskip("matplotlib")
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=tmp_path, mode="offline")
    try:
        defined = []
        define = logger.experiment.define_metric
        logger.experiment.define_metric = lambda name, **kwargs: (
            defined.append((name, kwargs)) or define(name, **kwargs)
        )
        fit(tmp_path, UltraSlowDiffusion(), logger=logger)
        summary = dict(logger.experiment.summary)
        assert (KEY + "distance", {"step_metric": KEY + "log_updates"}) in defined
        assert summary[KEY + "figure"]["_type"] == "images/separated"
        assert summary[KEY + "trace"]["ncols"] == 6
    finally:
        wandb.finish()


def test_plot_shows_laws_drops_and_reference(tmp_path, small_batch_run):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    diffusion = UltraSlowDiffusion(reference=str(small_batch_run))
    with pytest.warns(UserWarning, match="in its reference"):
        fit(tmp_path, diffusion, model=Net(milestones=[102]), max_epochs=20)
    figure, ax = diffusion.plot()
    assert ax.get_xscale() == "log"
    assert len(ax.lines) == 5  # reference, points, two laws, one drop
    assert [line.get_linestyle() for line in ax.lines].count(":") == 1
    matplotlib.pyplot.close(figure)


def test_compiled_model(tmp_path):
    class Silent(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.mse_loss(self.net(x), y)

    diffusion, reference = UltraSlowDiffusion(points_per_decade=5), Reference()
    fit(tmp_path, diffusion, reference, model=torch.compile(Silent(), backend="eager"), max_epochs=2)
    trace = diffusion.trace
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-6)


# ------------------------------------------------------------------------------------------------ parameters of a kind


class Odd(Net):
    """A network whose parameters are of a kind that is made, changed or added in the course of training."""

    kind = "plain"

    def __init__(self):
        super().__init__()
        if self.kind == "lazy":
            self.net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(1))
        elif self.kind == "lazy head never reached":
            self.head = nn.LazyLinear(3)
        elif self.kind == "frozen":
            self.net[0].requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_train_epoch_start(self):
        if self.kind == "another dtype" and self.current_epoch == 1:
            self.double()

    def training_step(self, batch, batch_idx):
        x, y = (tensor.to(self.net[-1].bias.dtype) for tensor in batch)
        return nn.functional.mse_loss(self.net(x), y)


class LateReference(Reference):
    """Copies the weights before the first update, when lazy ones have been made."""

    @staticmethod
    def vector(module):
        return torch.cat([p.detach().double().flatten() for p in module.net.parameters() if p.requires_grad])

    def on_train_start(self, trainer, pl_module):
        pass

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.start is None:
            self.start = self.vector(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.start is not None:
            super().on_train_batch_end(trainer, pl_module)


@pytest.mark.parametrize("regime", [False, True], ids=["alone", "with the others"])
@pytest.mark.parametrize("kind", ["plain", "lazy", "lazy head never reached", "frozen", "another dtype"])
def test_parameters_of_every_kind_are_measured_from_where_they_started(tmp_path, monkeypatch, kind, regime):
    monkeypatch.setattr(Odd, "kind", kind)
    diffusion, reference = UltraSlowDiffusion(points_per_decade=5, per_layer=True), LateReference()
    others = [LargeBatchRegime(8), GradientNoiseScale(every_n_updates=1), GhostBatchNorm(4)] if regime else []
    options = {"accumulate_grad_batches": 2, "max_epochs": 3} if regime else {"max_epochs": 3}
    fit(tmp_path, diffusion, reference, *others, model=Odd(), logger=CSVLogger(tmp_path), **options)
    trace = diffusion.trace
    assert trace["updates"][:4] == [1, 2, 3, 4]
    assert trace["distance"] == pytest.approx([reference.distances[t] for t in trace["updates"]], rel=1e-5)
    assert ("distance/net.0" in trace) == (kind != "frozen")
    assert not any(name.endswith("head") for name in trace)


def test_a_lazy_run_resumes_as_the_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(Odd, "kind", "lazy")
    whole, part, resumed = (UltraSlowDiffusion(points_per_decade=5) for _ in range(3))
    data = loader(shuffle=False)
    fit(tmp_path, whole, model=Odd(), data=data, max_epochs=4)
    run, _ = fit(tmp_path, part, model=Odd(), data=data, max_epochs=2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    fit(tmp_path, resumed, model=Odd(), data=data, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.trace == whole.trace


@pytest.mark.parametrize("module", [nn.LazyLinear(2), nn.Linear(2, 2, device="meta")])
def test_parameters_without_values_are_refused_with_a_remedy(module):
    for read in (tracked_parameters, WeightDistance, lambda module: estimate_alpha(module, lambda m: 0, radius=1.0)):
        with pytest.raises(ValueError, match=r"no values yet: weight.*Run a batch .*materialize .*exclude"):
            read(module)
    assert tracked_parameters(module, exclude="") == {}


# ------------------------------------------------------------------------------------------------------- not a number


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("from_update", [1, 105])
def test_distances_that_are_not_finite_are_said_once_and_kept_out_of_all_else(tmp_path, value, from_update):
    class Astray(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step + 1 == from_update:
                pl_module.net[4].weight.data[0, 0] = value

    write = UltraSlowDiffusion()
    fit(tmp_path / "reference", write, logger=CSVLogger(tmp_path / "reference"))
    diffusion, logger = UltraSlowDiffusion(reference=str(tmp_path / "reference")), CSVLogger(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, diffusion, Astray(), logger=logger, max_epochs=14)
    said = [str(warning.message) for warning in caught if "NaN or infinite" in str(warning.message)]
    assert len(said) == 1
    assert ("at update 1:" if from_update == 1 else "at update 112, and was a number at update 100:") in said[0]
    assert f"({'net.0' if from_update > 1 else 'net.4'}.weight" in said[0]  # what is astray spreads to the others
    trace = diffusion.trace
    kept = [t for t, d in zip(trace["updates"], trace["distance"], strict=True) if math.isfinite(d)]
    assert kept == [t for t in trace["updates"] if t < from_update]
    assert trace["updates"][-1] > 100
    fitted = diffusion.diffusion_fit
    assert (fitted and fitted.last_update) == (None if from_update == 1 else 100)
    assert (diffusion.advice is None) == (from_update == 1)
    diffusion.plot(matplotlib.figure.Figure().add_subplot())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = [float(row[KEY + "distance"]) for row in csv.DictReader(file) if row.get(KEY + "distance")]
    assert len(logged) == len(kept)
    assert all(map(math.isfinite, logged))


def test_a_trace_too_short_says_what_its_owner_can_do(tmp_path, capsys):
    fit(tmp_path, UltraSlowDiffusion(), max_epochs=1)
    said = " ".join(capsys.readouterr().out.split())
    assert "train longer, or call fit_diffusion with lower minimum_decades" in said
