"""Moving averages of the weights beside a regime: their decay, and that it is given back."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from regime_runs import Regression, SaveAt, loader, run
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_avg_fn

from lightning_gap.regime import LargeBatchRegime
from lightning_gap.trainer.internals.of_lightning import averaged_model
from lightning_gap.trainer.internals.of_torch import ema_decay

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*", "ignore:.*configure_model.*"
)


class Watches(LargeBatchRegime):
    """Notes the decay in the middle of training."""

    average = None
    seen = None

    def on_train_batch_start(self, trainer, *args):
        super().on_train_batch_start(trainer, *args)
        self.seen = ema_decay(averaged_model(self.average))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ema_rule": "half_life", "train_longer": False}, 0.9**4),
        ({"ema_rule": "half_life", "train_longer": True}, 0.9),
        ({"ema_rule": lambda decay, ratio: decay / ratio, "train_longer": False}, 0.225),
        ({"train_longer": False}, 0.9),
        ({"lr_rule": "auto", "train_longer": False}, 0.9**4),
    ],
)
@pytest.mark.parametrize("multi", [False, True])
def test_the_decay_follows_and_is_given_back(options, expected, multi):
    average = WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9)) if multi else EMAWeightAveraging(decay=0.9)
    regime = Watches(4, **options)
    regime.average = average
    run(Regression(), loader(16), average, regime)
    assert regime.seen == pytest.approx(expected)
    assert ema_decay(averaged_model(average)) == 0.9
    rows = [row for row in regime.plan.rows() if row[0].startswith("decay of")]
    assert len(rows) == (expected != 0.9)
    if rows:
        assert rows[0][1:] == ("0.9", f"{expected:.6g}")


def test_the_average_is_that_of_the_decay():
    trained = []
    for decay, options in ((0.8, {"ema_rule": "half_life"}), (0.8**4, {})):
        module = Regression()
        run(module, loader(16), EMAWeightAveraging(decay=decay), LargeBatchRegime(4, train_longer=False, **options))
        trained.append(module.layer.weight.detach().clone())  # the average, at the end
    assert torch.equal(*trained)


def test_a_resumed_average_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    def callbacks():
        return EMAWeightAveraging(decay=0.8), LargeBatchRegime(4, train_longer=False, ema_rule="half_life")

    whole, part = Regression(), Regression()
    run(whole, loader(16), *callbacks(), SaveAt(tmp_path))
    run(part, loader(16), *callbacks(), ckpt_path=tmp_path / "12.ckpt")
    for a, b in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_rule_without_an_average_is_refused_and_auto_does_without():
    with pytest.raises(MisconfigurationException, match=r"ema_rule=half_life finds no moving average .*EMAWeight"):
        run(Regression(), loader(16), LargeBatchRegime(4, ema_rule="half_life"))
    with pytest.raises(MisconfigurationException, match=r"finds no moving average"):
        run(
            Regression(),
            loader(16),
            WeightAveraging(avg_fn=get_swa_avg_fn()),
            LargeBatchRegime(4, ema_rule="half_life"),
        )
    run(Regression(), loader(16), LargeBatchRegime(4, lr_rule="auto"))
    rule = LargeBatchRegime(4, ema_rule=lambda decay, ratio: 1.5)
    with pytest.raises(MisconfigurationException, match=r"gave 1.5 for the decay 0.9"):
        run(Regression(), loader(16), EMAWeightAveraging(decay=0.9), rule)


def test_an_average_that_starts_at_an_update_is_warned_of():
    average = EMAWeightAveraging(decay=0.9, update_starting_at_step=8)
    with pytest.warns(UserWarning, match=r"update 8 of this run, and 2 of them see the samples that 8"):
        run(Regression(), loader(16), average, LargeBatchRegime(4, train_longer=False, ema_rule="half_life"))
