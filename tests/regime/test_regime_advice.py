"""What a plan says for itself before training."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from regime_runs import Regression, loader, run

from lightning_gap import GhostBatchNorm
from lightning_gap.regime import LargeBatchRegime, plan_regime
from lightning_gap.regime.words import advice


def said(**options):
    plan = plan_regime(**{"reference_batch_size": 128, "samples": 50_000, "max_epochs": 10, **options})
    return " ".join(advice(plan))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 4096}, "30.1 times the samples"),
        ({"batch_size": 4096, "train_longer": 0.0}, "did worse than no scaling"),
        ({"batch_size": 512, "lr_rule": "linear"}, "warmup_updates"),
        ({"batch_size": 16_000}, "1 in 4 updates is over 2000 samples, at the rate of 16000"),
    ],
)
def test_what_is_dear_or_doubtful_is_said(options, words):
    assert words in said(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 512},
        {"batch_size": 4096, "train_longer": 0.1},
        {"batch_size": 512, "train_longer": 0.0},
        {"batch_size": 16_000, "train_longer": 0.0, "drop_last": True, "lr_rule": "none"},
        {"batch_size": 128},
    ],
)
def test_nothing_is_said_of_the_rest(options):
    assert said(**options) == ""


class WithBatchNorm(Regression):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
def test_batchnorm_without_ghosts_is_said_at_run_time(capsys):
    class Optimized(WithBatchNorm):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    run(Optimized(), loader(30), LargeBatchRegime(15), max_epochs=1)
    assert "GhostBatchNorm(15)" in capsys.readouterr().out.replace("\n", " ")
    run(Optimized(), loader(30), LargeBatchRegime(15), GhostBatchNorm(15), max_epochs=1)
    assert "GhostBatchNorm(15)" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
def test_patience_is_told_in_updates():
    for options, updates in (({}, "45 updates"), ({"val_check_interval": 5}, "15 updates")):
        regime = LargeBatchRegime(4)
        stop = EarlyStopping("loss", patience=3, check_on_train_epoch_end=True)
        run(Regression(), loader(30), regime, stop, **options)
        assert f"EarlyStopping: patience of 3 checks, about {updates}" in regime.plan.companions
