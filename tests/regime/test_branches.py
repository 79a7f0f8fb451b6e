"""Branches: the same samples from the same state, and a critical batch where one is known."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import Regression, loader
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap.regime import BranchLosses, measure_critical_batch

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader", "ignore:.*learns nothing would pass")

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Seen(Regression):
    """A regression that keeps the samples of each batch, and each update's rate and samples so far."""

    batches, rates = [], []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch[0].clone())
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self.rates.append((optimizer.param_groups[0]["lr"], len(self.batches)))


@pytest.fixture
def seen():
    Seen.batches, Seen.rates = [], []
    return Seen


def measured(model, data=None, **options):
    given = {"samples": 40, "multiples": (1, 2, 4), "seeds": (0, 1), "accelerator": "cpu", "tolerance": 0.0}
    return measure_critical_batch(model, loader(5, shuffle=True) if data is None else data, **{**given, **options})


def test_all_branches_see_the_same_samples_in_updates_of_their_own(seen):
    branches = measured(seen(lr=0.01), seeds=(0,), samples=70)  # 14 batches, rounded up to 16: beyond one pass of 12
    one, two, four = torch.stack(seen.batches).split(16)
    assert torch.equal(one, two)
    assert torch.equal(one, four)
    assert len({tuple(each.flatten().tolist()) for each in one[:12]}) == 12  # one pass, without repetition
    updates = seen.rates[:16], seen.rates[16:24], seen.rates[24:]
    for multiple, made in zip((1, 2, 4), updates, strict=True):
        assert len(made) == 16 // multiple  # all of them of whole batches
        assert [rate for rate, _ in made] == pytest.approx([0.01 * math.sqrt(multiple)] * len(made))
    assert {key: rows.shape for key, rows in branches.losses.items()} == {1: (1, 16), 2: (1, 16), 4: (1, 16)}


def test_seeds_differ_in_order_and_repeat(seen):
    first = measured(seen(lr=0.01))
    batches = [torch.stack(seen.batches)[i : i + 8] for i in range(0, 48, 8)]
    assert not torch.equal(batches[0], batches[3])  # the other seed, after three branches
    model = Regression(lr=0.01)
    model.load_state_dict({"layer.weight": torch.ones(1, 4), "layer.bias": torch.zeros(1)})
    state = torch.get_rng_state()
    again = [measured(model), measured(model)]
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws are touched
    assert torch.equal(model.layer.weight, torch.ones(1, 4))
    for multiple in first.losses:
        np.testing.assert_array_equal(again[0].losses[multiple], again[1].losses[multiple])


def test_the_first_branch_is_the_run_itself(tmp_path):
    """From a checkpoint, with momentum and a rate that a schedule has lowered."""
    data = loader(5)
    model = Regression(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), lr=0.02)
    trainer = Trainer(max_epochs=2, **QUIET, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "here.ckpt")
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)
    branches = measured(model, data, ckpt_path=str(tmp_path / "here.ckpt"), seeds=(0,), samples=60)

    expected = []  # by hand, from where the optimizer stands
    for x, y in data:
        loss = torch.nn.functional.mse_loss(model.layer(x), y)
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(branches.losses[1][0], expected, rtol=1e-5)


class Late(LightningModule):
    """A module that knows its layer from its checkpoint alone."""

    size = None

    def configure_model(self):
        self.layer = torch.nn.Linear(4, 1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["size"] = 4

    def on_load_checkpoint(self, checkpoint):
        self.size = checkpoint["size"]

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_a_module_that_is_built_late_is_restored_too(tmp_path):
    model = Late()
    trainer = Trainer(max_epochs=2, **QUIET, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.fit(model, loader(60))
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    with torch.no_grad():
        x, y = next(iter(loader(60)))
        loss = torch.nn.functional.mse_loss(model.layer(x), y).item()
    branches = measured(Late(), loader(60), ckpt_path=str(tmp_path / "late.ckpt"), samples=60, lr_rule="none")
    assert branches.losses[2][0, 0] == pytest.approx(loss, rel=1e-5)


class Line(LightningModule):
    """Least squares with noise in the labels."""

    def __init__(self, start=0.0, lr=0.05):
        super().__init__()
        self.weight, self.lr = torch.nn.Parameter(torch.full((8,), start)), lr

    def training_step(self, batch, batch_idx):
        return (batch[0] @ self.weight - batch[1]).square().mean() / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.fixture(scope="module")
def noisy():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(512, 8, generator=draw)
    return DataLoader(TensorDataset(x, torch.randn(512, generator=draw)), batch_size=8, shuffle=True)


def test_near_the_minimum_no_branch_is_worse_and_far_from_it_all_are(noisy):
    options = {"samples": 512, "multiples": (1, 4), "seeds": (0, 1, 2), "accelerator": "cpu", "tolerance": 0.05}
    with pytest.warns(UserWarning, match="a branch that learns nothing would pass"):
        near = measure_critical_batch(Line(), noisy, **options)
    assert near.critical_batch == 32
    assert not near.is_bounded
    # There the loss falls in proportion to rate times updates, half as much at twice the rate and a quarter of updates.
    far = measure_critical_batch(Line(start=3.0, lr=0.01), noisy, **options)
    assert far.critical_batch == 8
    assert far.interval == (8, 8)
    assert far.is_bounded
    assert far.progress > 1 > 0.05 > near.progress


def test_a_datamodule_is_set_up_once_and_its_hooks_run():
    class Data(LightningDataModule):
        set_up = moved = 0

        def setup(self, stage):
            self.set_up += 1

        def train_dataloader(self):
            return loader(5)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            Data.moved += 1
            return batch

    data = Data()
    measured(Regression(), data, seeds=(0,), samples=20)
    assert data.set_up == 1
    assert Data.moved == 3 * 4


def test_accumulation_of_the_first_branch_counts():
    branches = measured(Regression(), accumulate_grad_batches=2, seeds=(0,), samples=20)
    assert branches.batch_size == 10
    assert branches.losses[1].shape == (1, 8)


def test_the_rule_of_adam_scales_the_moments():
    betas = []

    class Adam(Regression):
        def on_before_optimizer_step(self, optimizer):
            betas.append(optimizer.param_groups[0]["betas"][1])

    model = Adam(optimizer=torch.optim.Adam)
    measured(model, lr_rule="adam", seeds=(0,), samples=20)
    assert sorted(set(betas)) == pytest.approx([0.996, 0.998, 0.999])
    with pytest.warns(UserWarning, match="leaves its betas") as said:
        measured(Regression(optimizer=torch.optim.Adam), samples=20)
    assert sum("leaves its betas" in str(each.message) for each in said) == 1
    with pytest.raises(ValueError, match="adam"):
        measured(Regression(), lr_rule="adam", seeds=(0,))


LOSSES = {1: [1.0, 1.1], 2: [1.004, 1.102], 4: [1.0, 1.104], 8: [1.2, 1.0], 16: [1.3, 1.4]}


def of(losses, **options):
    return BranchLosses(
        10, {k: np.array(rows)[:, None] for k, rows in losses.items()}, **{"tolerance": 0.01, "window": 1, **options}
    )


def test_the_largest_batch_that_is_recovered_with_all_smaller_ones():
    branches = of(LOSSES)
    assert branches.critical_batch == 40
    assert of({**LOSSES, 2: [1.2, 1.3]}).critical_batch == 10  # though 4 is
    low, high = branches.interval
    assert low <= 40 <= high
    assert high == 80  # two seeds that disagree say little
    assert of({k: rows * 20 for k, rows in LOSSES.items()}).interval[0] == 40


def test_a_branch_that_diverged_is_worse_than_any():
    branches = of({1: [1.0, 1.1], 2: [math.nan, 1.1]})
    assert branches.critical_batch == 10
    assert branches.interval == (10, 10)


def test_one_seed_gives_no_interval():
    assert of({1: [1.0], 2: [1.0], 4: [9.0]}).interval == (10, 40)
    assert of({1: [1.0], 2: [1.0], 4: [9.0]}).critical_batch == 20


def test_the_table_has_a_row_for_each_branch():
    table = of(LOSSES).table()
    assert list(table.columns[0].cells) == ["10", "20", "40", "80", "160"]
    assert list(table.columns[-1].cells) == ["yes", "yes", "yes", "no", "no"]


class Manual(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"samples": 0}, ValueError, "samples"),
        ({"multiples": (2, 4)}, ValueError, "1 among them"),
        ({"multiples": (1,)}, ValueError, "1 among them"),
        ({"multiples": (1, 2.5)}, TypeError, "multiples"),
        ({"seeds": ()}, ValueError, "seeds"),
        ({"seeds": (1, 1)}, ValueError, "seeds"),
        ({"window": 0}, ValueError, "window=0"),
        ({"tolerance": -1}, ValueError, "tolerance"),
        ({"confidence": 95}, ValueError, "confidence"),
        ({"lr_rule": "square"}, ValueError, "lr_rule='square'"),
        ({"strategy": "ddp", "devices": 2}, ValueError, "devices, strategy cannot be given"),
        ({"accumulate_grad_batches": 0}, ValueError, "accumulate_grad_batches"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        measured(Regression(), **options)


def test_wrong_models_and_checkpoints_are_refused(tmp_path):
    with pytest.raises(TypeError, match="LightningModule"):
        measured(torch.nn.Linear(4, 1))
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        measured(Manual())
    trainer = Trainer(max_epochs=1, **QUIET, enable_checkpointing=True, default_root_dir=tmp_path)
    model = Regression()
    trainer.fit(model, loader(5))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="save_weights_only=False"):
        measured(model, ckpt_path=str(tmp_path / "weights.ckpt"))
    with pytest.raises(MisconfigurationException, match="batch size"):
        measured(model, [torch.zeros(4)])
