"""``lightning-gap plan --rule auto``: what the regime chooses when it trains, and nothing that it cannot know."""

import pytest
import torch
from logged_runs import Net, run_to_target, trainer
from test_commands import _rows, _said
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import LargeBatchRegime
from lightning_gap.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*")
BATCHES = ("plan", "--batch-size", "16", "--reference-batch-size", "4", "--rule", "auto")
RUN = ("--samples", "50", "--epochs", "6", "--lr", "0.02")


class AdamWNet(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


class SGDNet(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


@pytest.mark.parametrize("module", [AdamWNet, SGDNet])
@pytest.mark.parametrize("longer", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("noise_scale", [None, 20.0])
def test_it_plans_what_training_chooses(capsys, tmp_path, module, longer, noise_scale):
    regime = LargeBatchRegime(4, lr_rule="auto", train_longer=longer, noise_scale=noise_scale)
    fit = trainer(tmp_path, False, max_epochs=6, callbacks=[regime], enable_checkpointing=False)
    fit.fit(module(), DataLoader(TensorDataset(torch.randn(50, 4), torch.randn(50, 1)), 16))
    capsys.readouterr()
    words = [*BATCHES, *RUN, "--optimizer", module.__name__.removesuffix("Net"), "--train-longer", str(longer)]
    rows = _rows(_said(capsys, *words, *([] if noise_scale is None else ["--noise-scale", str(noise_scale)])))
    trained = {name: cells for name, *cells in regime.plan.rows()}
    for name, cells in rows.items():
        if "(timescale)" not in name and "(half_life)" not in name:  # what these become is told group by group there
            assert trained[name] == cells
    changed = {name.partition(",")[0]: (there, now) for name, there, now in regime.plan.hyperparameters}
    assert ("weight decay (timescale)" in rows) == ("weight decay" in changed)
    if "weight decay" in changed:
        there, now = map(float, changed["weight decay"])
        assert float(rows["weight decay (timescale)"][1].removeprefix("x")) == pytest.approx(now / there, rel=1e-3)
    assert ("second moments' beta (half_life)" in rows) == ("betas" in changed)


def test_a_run_of_updates_is_planned_too(capsys):
    rows = _rows(_said(capsys, *BATCHES, "--updates", "300", "--optimizer", "SGD", "--lr", "0.1"))
    assert rows['lr_rule="auto"'][1] == "sqrt, with a warm-up over 10 % of the updates"
    assert rows["warm-up from the reference rate"][1] == "30 updates"
    rows = _rows(_said(capsys, *BATCHES, "--updates", "300", "--optimizer", "SGD", "--warmup-updates", "7"))
    assert rows["warm-up from the reference rate"][1] == "7 updates"
    rows = _rows(_said(capsys, *BATCHES, *RUN, "--optimizer", "Adam", "--train-longer", "0"))
    assert rows["weight decay (timescale)"][1] == "x2, where it is decoupled"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*BATCHES, *RUN], "give --optimizer, as SGD or AdamW"),
        ([*BATCHES, "--optimizer", "SGD"], "give its length, --epochs with --samples or --updates"),
        ([*BATCHES, *RUN, "--optimizer", "Mine"], "invalid choice: 'Mine'"),
        ([*BATCHES, *RUN, "--optimizer", "SGD", "--noise-scale", "nan"], "'nan' is not a finite number"),
        ([*BATCHES[:-1], "sqrt", "--optimizer", "SGD"], "--optimizer is for --rule auto alone, and the rule is sqrt"),
        ([*BATCHES[:-1], "none", "--noise-scale", "9"], "--noise-scale is for --rule auto alone"),
        (["plan", "--from", "runs", "--rule", "auto"], "give --optimizer, as SGD or AdamW"),
        (["plan", "--from", "runs", "--optimizer", "SGD"], "--optimizer is for --rule auto alone"),
    ],
)
def test_what_it_cannot_know_is_refused(capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert message in capsys.readouterr().err


def test_from_runs_the_critical_batch_decides(tmp_path, capsys):
    for batch in (16, 64, 256):  # S = 100 + 6400 / B
        run_to_target(tmp_path / f"b{batch}", batch)
    words = ("plan", "--from", str(tmp_path), "--target", "val_loss<=0.3", "--multiples", "1,4", "--rule", "auto")
    text = _said(capsys, *words, "--optimizer", "SGD")
    lines = [line.split() for line in text.splitlines() if line.strip().startswith("×")]
    # 500 updates become 200: the rate grows by the root of 2.5, and is warmed up over 20.
    assert lines[0][2:] == ["0.1", "0.01", "500", "8,000", "one", "batch", "0"]
    assert lines[1][2:] == ["0.1581", "0.0253", "200", "12,800", "sqrt", "of", "2.5", "20"]
    said = " ".join(text.split())
    assert "--rule auto, for SGD at 64: sqrt of 2.5, the updates that a noise scale of 64 saves" in said
    assert "as it is: LARS has no square-root rule" in _said(capsys, *words, "--optimizer", "LARS")
