"""The callbacks on a LightningModule that is compiled whole, as Lightning documents it."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import GhostBatchNorm, LargeBatchRegime, UltraSlowDiffusion


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):  # Lightning's self.log does not compile
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


@pytest.mark.compiler
def test_all_callbacks_at_once(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    traces, weights = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, diffusion = Net(), UltraSlowDiffusion(points_per_decade=5)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[LargeBatchRegime(4), GhostBatchNorm(4), diffusion],
        )
        data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)
        trainer.fit(torch.compile(model, backend="aot_eager") if compiled else model, data)
        assert trainer.global_step == 32
        traces.append(diffusion.trace["distance"])
        weights.append([p.detach() for p in model.parameters()])
    assert traces[1] == pytest.approx(traces[0], rel=1e-4)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
