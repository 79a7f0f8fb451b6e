"""``lightning-gap transport`` of a folder by several processes: launchers, and kill -9 at any moment."""

import contextlib
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

from lightning_gap import MongeMap
from lightning_gap.cli import main
from lightning_gap.commands import transport
from lightning_gap.monge import ResidualMLP
from lightning_gap.monge.transport_files import load_map
from lightning_gap.trainer.launch import Place

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are asked for in /proc"),
]

FILES = 6
WORDS = ["transport", "map.ckpt", "in", "out", "--device", "cpu", "--batch-size", "64"]


def work(folder, environment, words, moment=None):
    """Run the command; with a moment, end without a trace when so many calls of the system's have been made."""
    os.chdir(folder)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    if moment is not None:
        kill_at(moment)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        main(words)


def kill_at(moment):
    """Count what touches the folder of images, and be killed at a number."""
    calls = 0

    def counted(event, arguments):
        nonlocal calls
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.utime", "os.link", "os.rmdir") and any(
            "out" in str(argument) for argument in arguments[:2]
        ):
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(counted)


@pytest.fixture(scope="module")
def processes():
    """What starts processes that have imported everything: one of a test takes no longer than its work."""
    if torch.get_num_threads() == 1:  # else the fork of a process that has computed may hang
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_gap.monge.transport_folder", "pandas", "pyarrow.parquet", __name__])
    return context


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    from lightning.pytorch import Trainer

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = MongeMap(map=ResidualMLP(2, [8]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    trainer.strategy.connect(model)
    trainer.save_checkpoint("map.ckpt")
    generator = np.random.default_rng(0)
    Path("in/deep").mkdir(parents=True)
    for i in range(FILES):
        frame = pandas.DataFrame(generator.normal(size=(500, 2)).astype(np.float32), columns=["u", "v"])
        frame["id"] = [f"{i}-{row}" for row in range(len(frame))]
        frame.to_parquet(f"in/{'deep/' if i % 2 else ''}{i}.parquet")


def images(folder="out"):
    names = sorted(p for p in Path(folder).rglob("*.parquet"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in names}


def uninterrupted():
    with contextlib.redirect_stdout(io.StringIO()):
        main([word if word != "out" else "whole" for word in WORDS])
    return images("whole")


def start(processes, *words, moment=None, **environment):
    process = processes.Process(target=work, args=(os.getcwd(), environment, [*WORDS, *words], moment))
    process.start()
    return process


def ended(*running):
    for process in running:
        process.join(120)
    return [process.exitcode for process in running]


def the_rest_is_done(expected):
    """A last run finds what is missing, and the bits of the uninterrupted one."""
    main(WORDS)
    assert images() == expected
    left = sorted(p.name for p in Path("out/.lightning_gap").rglob("*") if p.is_file())
    assert left == ["asked.json"]


@pytest.mark.parametrize("moments", [(7, 12, 16, 20)])
def test_what_is_killed_is_taken_over_by_who_lives(processes, moments):
    expected = uninterrupted()
    # Each dies at another point of its first or second file, all while another one works.
    assert ended(*[start(processes, moment=moment) for moment in moments]) == [-signal.SIGKILL] * len(moments)
    assert all(images()[name] == expected[name] for name in images())
    assert len(images()) < FILES
    the_rest_is_done(expected)


LAUNCHERS = {
    "torchrun": lambda rank: {
        "TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    },
    "slurm": lambda rank: {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "map", "SLURM_NODEID": "0", "SLURM_NNODES": "1",
    },
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_share_a_folder(processes, launcher):
    running = [start(processes, "--devices", "2", **LAUNCHERS[launcher](rank)) for rank in range(2)]
    assert ended(*running) == [0, 0]
    assert images() == uninterrupted()


def test_every_image_is_right(capsys):
    pandas = pytest.importorskip("pandas")
    main(WORDS)
    assert "6 of 6 files, 3000 rows, mapped to out in" in capsys.readouterr().out
    model = load_map("map.ckpt")
    for name in images():
        given, out = pandas.read_parquet(f"in/{name}"), pandas.read_parquet(f"out/{name}")
        expected = model.transport(given[["u", "v"]].to_numpy()).numpy()
        assert np.allclose(out[["u", "v"]].to_numpy(), expected, atol=1e-6)
        assert out["id"].tolist() == given["id"].tolist()


@pytest.mark.parametrize("how", ["SIGTERM", "an error", "no more processes"])
def test_the_siblings_end_with_the_command(monkeypatch, how):
    started, before, popen = [], signal.getsignal(signal.SIGTERM), subprocess.Popen

    def start(command, env):
        if how == "no more processes" and started:
            raise BlockingIOError
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(transport.subprocess, "Popen", start)
    expected = {"SIGTERM": SystemExit, "an error": KeyError, "no more processes": BlockingIOError}[how]
    within = {}.pop if how == "an error" else signal.raise_signal
    with pytest.raises(expected) as ended, transport._siblings(Place(0, 3, 0, siblings=2), ["transport"]):
        within(signal.SIGTERM)
    assert how != "SIGTERM" or ended.value.code == 143
    assert [process.returncode for process in started] == [-signal.SIGTERM] * (1 if "no" in how else 2)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_kills_at_twenty_random_moments_lose_nothing(processes):
    """Two processes at a time, one of them killed at a random moment, and started again."""
    expected, dice = uninterrupted(), random.Random(0)
    began = time.perf_counter()
    assert ended(start(processes)) == [0]
    alone = time.perf_counter() - began
    assert images() == expected
    kills = 0
    while kills < 20:
        for path in Path("out").rglob("*.parquet"):
            if dice.random() < 0.7:
                path.unlink()
        running = [start(processes) for _ in range(2)]
        time.sleep(dice.uniform(0, 1.2 * alone))
        if running[0].exitcode is None:
            os.kill(running[0].pid, signal.SIGKILL)
            kills += 1
        _, status = ended(*running)
        assert status == 0
        assert images() == expected
    the_rest_is_done(expected)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "devices"])
def test_processes_of_the_real_launcher(launcher):
    before = [sys.executable, "-m"]
    if launcher == "torchrun":
        before += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*before, "lightning_gap", *WORDS, "--devices", "2"],
        env=environment, check=True, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = sorted(line.partition(":")[0] for line in done.stdout.splitlines())
    assert said == ["process 0 of 2", "process 1 of 2"]
    assert images() == uninterrupted()
