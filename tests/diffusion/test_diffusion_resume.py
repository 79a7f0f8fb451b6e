"""Runs that go on: from a checkpoint, in a second fit, under other options."""

import math

import pytest
import torch
from diffusion_runs import Net, Reference, fit, loader, read_csv, saver
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap.diffusion import (
    UltraSlowDiffusion,
)


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


def test_resumed_run_goes_on_in_the_same_csv(tmp_path):
    checkpoint = lambda: ModelCheckpoint(tmp_path / "run", save_last=True)  # noqa: E731
    fit(tmp_path, UltraSlowDiffusion(), checkpoint(), max_epochs=1, enable_checkpointing=True)
    diffusion = UltraSlowDiffusion()
    last = tmp_path / "run" / "last.ckpt"
    fit(tmp_path, diffusion, checkpoint(), max_epochs=3, enable_checkpointing=True, ckpt_path=last)
    assert [float(row["updates"]) for row in read_csv(tmp_path / "run" / "diffusion.csv")] == diffusion.trace["updates"]
    assert diffusion.trace["updates"][-1] == 28
    assert not (tmp_path / "run" / "diffusion-v1.csv").exists()
