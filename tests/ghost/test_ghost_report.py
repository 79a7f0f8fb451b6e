"""What a run with ghosts says, once."""

import pytest
import torch
import yaml
from ghost_runs import Net, data, net, trainer
from torch.utils.data import DataLoader

from lightning_gap import BatchSizeSchedule, LargeBatchRegime
from lightning_gap.ghost import GhostBatchNorm


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


@pytest.mark.parametrize(("reference", "said"), [(4, False), (8, True)])
def test_a_reference_run_of_another_batch_is_said(reference, said, capsys):
    class Decaying(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer(LargeBatchRegime(reference, train_longer=False), GhostBatchNorm(4)).fit(net(Decaying), data())
    printed = " ".join(capsys.readouterr().out.split())
    assert ("reference run of LargeBatchRegime has 8 samples a batch, a ghost 4" in printed) == said
    growing = BatchSizeSchedule(lambda samples: 16, reference_batch_size=reference if said else None)
    trainer(growing, GhostBatchNorm(4)).fit(net(Decaying), data())
    assert ("the reference run of BatchSizeSchedule has" in capsys.readouterr().out) == said
