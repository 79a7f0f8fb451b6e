"""Shards beside a checkpoint: their metadata are a pickle, of which nothing but torch's own data is made."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from lightning_gap.ranks.shards import load_shards, save_shards

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.arange(3)}


def test_what_was_saved_is_loaded(tmp_path):
    save_shards(TENSORS, str(tmp_path / "shards"))
    for name, tensor in load_shards(TENSORS, str(tmp_path / "shards")).items():
        assert torch.equal(tensor, TENSORS[name])


class Runs:
    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_else_is_run(tmp_path):
    folder = tmp_path / "shards"
    save_shards(TENSORS, str(folder))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    made = tmp_path / "pwned"
    for payload in (Runs(os.system, f"touch {made}"), Runs(eval, f"open({str(made)!r}, 'w')"), Runs(Path.touch, made),
                    Runs(torch.save, 1, str(made)), Runs(torch.hub.load, "a/b", "c")):  # fmt: skip
        metadata.planner_data = payload
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match=r"\.metadata names .*, which is not run: copy the folder anew"):
            load_shards(TENSORS, str(folder))
    assert not made.exists()
