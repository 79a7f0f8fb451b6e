"""BatchSizeSchedule in runs that end early, are killed, or go on from a checkpoint."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from planned_batches import BASE, STEPS
from regime_runs import EPOCH_SCHEDULES, Regression, loader, run, trainer_of

from lightning_gap import BatchSizeSchedule

pytestmark = pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*", "ignore:.*callbacks used to create.*")


def test_the_same_trainer_fits_again_as_the_first_time():
    callback = BatchSizeSchedule(STEPS)
    trainer = trainer_of(callback)
    first, second = Regression(EPOCH_SCHEDULES["StepLR"]), Regression(EPOCH_SCHEDULES["StepLR"])
    second.load_state_dict(first.state_dict())
    data = loader(BASE)
    trainer.fit(first, data)
    steps = trainer.global_step
    trainer = trainer_of(callback)
    trainer.fit(second, data)
    assert trainer.global_step == steps
    assert torch.equal(first.layer.weight, second.layer.weight)


def test_a_failing_step_gives_everything_back():
    class Fails(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("failed")
            return super().training_step(batch, batch_idx)

    data = loader(BASE)
    trainer = trainer_of(BatchSizeSchedule(STEPS))
    with pytest.raises(RuntimeError, match="failed"):
        trainer.fit(Fails(), data)
    assert trainer.fit_loop._data_source.instance is data
    assert trainer.fit_loop.epoch_loop.max_steps == -1
    trainer = trainer_of(BatchSizeSchedule(STEPS))
    trainer.fit(Regression(), data)
    assert trainer.global_step == 42


def test_a_checkpoint_of_another_schedule_or_of_none_is_refused(tmp_path):
    trainer, _ = run(Regression(), loader(BASE), BatchSizeSchedule(STEPS), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "schedule.ckpt")
    trainer, _ = run(Regression(), loader(BASE), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    for path, callback, words in (
        ("schedule", BatchSizeSchedule([(0, 4), (8, 8)]), "another BatchSizeSchedule"),
        ("schedule", BatchSizeSchedule(STEPS, reference_batch_size=2), "reference_batch_size=4 and not 2"),
        ("plain", BatchSizeSchedule(STEPS), "without BatchSizeSchedule"),
    ):
        with pytest.raises(MisconfigurationException, match=words):
            run(Regression(), loader(BASE), callback, ckpt_path=tmp_path / f"{path}.ckpt")


SCRIPT = """
import sys, warnings, logging
warnings.simplefilter("ignore"); logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
from pathlib import Path
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from regime_runs import Regression, SCHEDULES, loader
from lightning_gap import BatchSizeSchedule
folder = Path(sys.argv[1])
seed_everything(0, verbose=False)
torch.set_num_threads(1)
module = Regression(lambda o: SCHEDULES["CosineAnnealingLR"](o, 15), interval="step")
save = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=0)
trainer = Trainer(max_epochs=6, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[BatchSizeSchedule([(0, 4), (100, 12), (200, 20)], max_device_batch_size=7), save])
last = folder / "last.ckpt"
(folder / "ready").touch()
trainer.fit(module, loader(4, shuffle=True), ckpt_path=str(last) if last.exists() else None)
torch.save({"weights": module.state_dict(), "steps": trainer.global_step}, folder / "end.pt")
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_twenty_moments_ends_as_one_that_is_not(tmp_path):
    random.seed(0)
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parents[1]}", "OMP_NUM_THREADS": "1"}

    def start(folder):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-c", SCRIPT, str(folder)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    wanted = torch.load(tmp_path / "whole" / "end.pt")
    kills = 0
    for attempt in range(60):
        folder = tmp_path / f"killed{kills // 5}"
        (folder / "ready").unlink(missing_ok=True)
        process = start(folder)
        while not (folder / "ready").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0.05, 0.6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if kills == 20:
            break
        assert attempt < 59
    for folder in sorted(tmp_path.glob("killed*")):
        assert start(folder).wait() == 0
        found = torch.load(folder / "end.pt")
        assert found["steps"] == wanted["steps"]
        for name, weight in wanted["weights"].items():
            assert torch.equal(found["weights"][name], weight)
