"""A map that several processes have trained: the first one writes it, whole."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from monge_runs import gaussians, samples, small, trainer

from lightning_gap import MongeMap

pytest.importorskip("safetensors.torch")


class SaveEverywhere(Callback):
    """Saves the map in each process, in a folder of its own, and its images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        pl_module.save_pretrained(self.folder / f"map {trainer.global_rank}")
        torch.save(pl_module.transport(gaussians(9)[0]), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.distributed
def test_the_first_of_several_processes_writes(tmp_path):
    options = {"strategy": "ddp_fork", "devices": 2, "max_steps": 2}
    trainer(callbacks=[SaveEverywhere(tmp_path)], **options).fit(small(), samples(batch_size=16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt", "map 0"]
    loaded = MongeMap.from_pretrained(tmp_path / "map 0")
    assert loaded.record.updates == 2
    for rank in range(2):
        assert torch.equal(loaded.transport(gaussians(9)[0]), torch.load(tmp_path / f"{rank}.pt"))
