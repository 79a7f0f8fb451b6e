"""Places of processes that torchrun, SLURM or a sibling started."""

import pytest
import torch

from lightning_gap.trainer.launch import Place, environments_of_siblings, launched

ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
SLURM = {
    "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch):
    for name in (*ELASTIC, *SLURM, "NODE_RANK", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("environment", [ELASTIC, SLURM])
@pytest.mark.parametrize("numbers", [(None, None), (2, 2), (2, None), (None, 2)])
def test_a_launcher_tells_the_place(monkeypatch, environment, numbers):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched(*numbers) == Place(rank=3, ranks=4, local_rank=1)


@pytest.mark.parametrize(("environment", "name"), [(ELASTIC, "torchrun"), (SLURM, "SLURM")])
@pytest.mark.parametrize(
    ("numbers", "said"), [((3, None), "--devices 3, but"), ((2, 3), "--devices 2 and --num-nodes 3, but")]
)
def test_other_numbers_than_the_launcher_s_are_refused(monkeypatch, environment, name, numbers, said):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=f"{said} {name} has started 4 processes"):
        launched(*numbers)


def test_a_job_by_hand_on_slurm_is_one_process(monkeypatch):
    for name, value in {**SLURM, "SLURM_JOB_NAME": "interactive"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == Place()


@pytest.mark.parametrize("step", [None, "4294967290", "4294967291", "4294967292", "-5"])
@pytest.mark.parametrize("per_node", [True, False])
def test_a_batch_script_is_one_process(monkeypatch, step, per_node):
    for name, value in {**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": step}.items():
        if value is not None and (per_node or "PER_NODE" not in name):
            monkeypatch.setenv(name, value)
    assert launched() == Place()
    assert launched(devices=2) == Place(0, 2, 0, siblings=1)


def test_numbers_that_lightning_does_not_take_are_refused(monkeypatch):
    for name, value in SLURM.items():
        if "PER_NODE" not in name:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"SLURM: You set `--ntasks=4`.*Use `--ntasks-per-node"):
        launched()


def test_without_a_launcher_the_first_starts_the_others(monkeypatch):
    assert launched() == Place(0, 1, 0, 0)
    assert launched(3) == Place(0, 3, 0, siblings=2)
    monkeypatch.setenv("NODE_RANK", "1")
    first = launched(2, 2)
    assert first == Place(2, 4, 0, siblings=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (environment,) = environments_of_siblings(first).values()
    assert environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("LOCAL_RANK", environment["LOCAL_RANK"])
    assert launched(2, 2) == Place(3, 4, 1, siblings=0)


def test_siblings_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        environments = environments_of_siblings(Place(0, 2, 0, siblings=1))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert {rank: each["OMP_NUM_THREADS"] for rank, each in environments.items()} == {1: "2"}


@pytest.mark.parametrize(
    ("name", "value", "numbers", "said"),
    [
        ("NODE_RANK", "1", (2, None), "NODE_RANK is 1, but --num-nodes is 1"),
        ("LOCAL_RANK", "2", (2, None), "LOCAL_RANK is 2, but --devices is 2"),
    ],
)
def test_places_outside_are_refused(monkeypatch, name, value, numbers, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        launched(*numbers)
