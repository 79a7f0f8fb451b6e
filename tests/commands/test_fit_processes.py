"""``lightning-gap fit`` on two processes, as torchrun and SLURM start them."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo import enter_world, free_port, leave_world

pytest.importorskip("jsonargparse")

from lightning_gap import MongeMap
from lightning_gap.cli import main
from lightning_gap.commands import map_cli  # noqa: F401  before the fork, once

pytestmark = pytest.mark.distributed

WORDS = [
    "fit", "--data.source=a.npy", "--data.target=b.npy", "--data.batch_size=16", "--trainer.accelerator=cpu",
    "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false", "--trainer.num_sanity_val_steps=0", "--model.map=ResidualMLP",
    "--model.map.dim=2", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=run",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.normal(size=(64, 2)).astype("f4"))
    np.save(tmp_path / "b.npy", rng.normal(size=(64, 2)).astype("f4") + 2)
    monkeypatch.chdir(tmp_path)


def by_torchrun(rank, port):
    enter_world(rank, 2, port)


def by_slurm(rank, port):
    enter_world(rank, 2, port)
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        del os.environ[name]
    os.environ.update(
        SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank),
        SLURM_JOB_ID="1", SLURM_JOB_NAME="map", SLURM_NODEID="0", SLURM_NNODES="1",
    )  # fmt: skip


def work(launcher, rank, port, folder):
    launcher(rank, port)
    os.chdir(folder)
    with open(f"said{rank}.txt", "w", encoding="utf-8") as said:
        sys.stdout = said
        main(WORDS)
    leave_world()


def the_run_is_right(said):
    """Training ended, on batches of both ranks, and rank zero alone wrote and spoke."""
    (checkpoint,) = Path("logs/run").rglob("*.ckpt")
    assert [text.count("checkpoint: ") for text in said] == [1, 0]
    assert checkpoint.name in said[0].replace("\n", "")
    assert sorted(path.name for path in Path("logs/run/version_0").iterdir() if path.is_file()) == [
        "config.yaml", "hparams.yaml", "metrics.csv",
    ]  # fmt: skip
    state = torch.load(checkpoint, weights_only=True)
    assert state["global_step"] == 2
    model = MongeMap.load_from_checkpoint(checkpoint)
    assert torch.isfinite(model.transport(np.load("a.npy"))).all()


@pytest.mark.parametrize("launcher", [by_torchrun, by_slurm])
def test_fit_trains_on_the_processes_of_a_launcher(launcher, tmp_path):
    # The fork of a process that has computed on several threads may hang.
    context = multiprocessing.get_context("fork" if torch.get_num_threads() == 1 else "spawn")
    port = free_port()
    running = [context.Process(target=work, args=(launcher, rank, port, tmp_path)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(180)
    assert [process.exitcode for process in running] == [0, 0]
    the_run_is_right([Path(f"said{rank}.txt").read_text(encoding="utf-8") for rank in range(2)])


@pytest.mark.slow
def test_fit_by_torchrun_itself():
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lightning_gap"]
    command = [sys.executable, "-m", *launcher, *WORDS]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    the_run_is_right([done.stdout, ""])
