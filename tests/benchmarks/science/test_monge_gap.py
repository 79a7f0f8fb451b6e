"""The Monge-gap paper's maps: from samples to the page by way of the command line, and page and logs."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

from lightning_gap import MongeMap

pytest.importorskip("jsonargparse")

from benchmarks import marked
from benchmarks.logs import RESULTS, read
from benchmarks.science.monge_gap import ablations, first_weights, results, suite, tasks

SHORT = ["--", "--trainer.max_steps", "2", "--data.steps_per_epoch", "2", "--data.batch_size", "64"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*val_check_interval.*", "ignore:.*exists and is not empty.*", "ignore:.*Sinkhorn.*"
)


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    """LightningCLI warns where the process has arguments of its own."""
    monkeypatch.setattr(sys, "argv", ["suite.py"])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file as the benchmark's, of a map that is the gradient of a convex function."""
    folder = tmp_path_factory.mktemp("pairs")
    draws = np.random.default_rng(0)
    stretch = np.array([2.0, 0.5])
    x, y, test = (draws.normal(size=(n, 2)).astype(np.float32) for n in (600, 600, 2048))
    np.savez(
        folder / "w2_mix3to10_D2.npz",
        train_x=x,
        train_y=(y * stretch).astype(np.float32),
        test_x=test,
        test_map=(test * stretch).astype(np.float32),
        var_out=np.float64(4.25),
    )
    return folder


@pytest.mark.parametrize("name", tasks.TASKS)
def test_samples_follow_from_their_seed(name):
    if name == "moon":
        pytest.importorskip("sklearn")
    drawn, again, other = (tasks.samples(name, seed, train=50, test=20) for seed in (0, 0, 1))
    assert {key: value.shape for key, value in drawn.items()} == {
        "train_x": (50, 2),
        "train_y": (50, 2),
        "test_x": (20, 2),
        "test_y": (20, 2),
        "other_y": (20, 2),
    }
    for key, value in drawn.items():
        assert value.dtype == np.float32
        assert (value == again[key]).all()
        assert (value != other[key]).any()
    assert (drawn["test_y"] != drawn["other_y"]).any()


def test_the_peers_first_weights():
    drawn = first_weights.FlaxStart(50, (400, 300))
    weights = [layer.weight.detach() for layer in drawn.displacement.modules() if isinstance(layer, torch.nn.Linear)]
    assert [weight.shape for weight in weights] == [(400, 50), (300, 400), (50, 300)]
    for weight in weights:
        assert float(weight.std() * weight.shape[1] ** 0.5) == pytest.approx(1, rel=0.03)
        assert float(weight.abs().max() * weight.shape[1] ** 0.5) <= 2 / 0.8796
    assert not any(value.any() for name, value in drawn.named_parameters() if name.endswith("bias"))


def test_from_samples_to_the_page(tmp_path, pairs, monkeypatch):
    monkeypatch.setattr(suite, "samples", lambda task, seed: tasks.samples(task, seed, train=256, test=64))
    monkeypatch.setattr(ablations, "HIDDEN", (8,))
    monkeypatch.setattr(ablations, "SEEDS", (0,))
    monkeypatch.setattr(ablations, "HEADLINE_SEEDS", (0, 1))
    logs, runs, page = tmp_path / "logs", tmp_path / "runs", tmp_path / "page.md"
    words = ["--tasks", "circles", "square", "--seeds", "0", "--runs", str(runs), "--logs", str(logs), *SHORT]
    suite.main(words)
    rows = read(logs / "monge_gap_suite.jsonl")
    assert len(rows) == 2 * len(suite.GAPS) * len(suite.OURS)
    assert all(row["updates"] == 2 and row["seconds"] > 0 and row["gap_l22"] > -1e-9 for row in rows)
    # What a peer leaves is scored as our own is; what has been scored is not scored again.
    folder = runs / "square" / "0"
    shutil.copy(folder / "lightning_gap_l2.npz", folder / "ott_l2.npz")
    suite.main(words)
    ours, theirs = (
        [
            row
            for row in read(logs / "monge_gap_suite.jsonl")
            if (row["task"], row["gap"], row["library"]) == ("square", "l2", library)
        ]
        for library in ("lightning_gap", "ott")
    )
    assert len(ours) == len(theirs) == 1
    assert {**ours[0], "library": ""} == {**theirs[0], "library": ""}

    options = ["--data", str(pairs), "--dims", "2", "--logs", str(logs), "--updates", "2"]
    ablations.main([*options, "--only", "weight", "convention"])
    found = read(logs / "monge_gap_ablations.jsonl")
    assert len(found) == 5 + 3 + 2
    ablations.main([*options, "--only", "weight"])
    assert read(logs / "monge_gap_ablations.jsonl") == found
    same = [
        row["uvp"]
        for row in found
        if row["convention"] in ("shannon", "kl") and row["gap_weight"] == 1 and not row["seed"]
    ]
    assert len(same) == 2
    assert same[0] == pytest.approx(same[1], rel=1e-4)  # conventions that differ by a constant

    known = [
        {"section": "w2", "D": 2, "map": "identity", "uvp": 32.8, "cosine": 0.0},
        {"section": "w2", "D": 2, "map": "Gaussian", "uvp": 13.9, "cosine": 0.7},
        {"section": "w2", "D": 2, "map": "BrenierMap", "seed": 0, "seconds": 50.0, "uvp": 0.25, "cosine": 0.99},
    ]
    (logs / "monge_gap_known_maps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    made = results.blocks(results.read(logs))
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in made))
    places = ["--logs", str(logs), "--page", str(page), "--images", str(tmp_path / "images")]
    with pytest.raises(SystemExit, match="suite, seconds, w2"):
        results.main([*places, "--check"])
    pytest.importorskip("matplotlib")
    results.main(places)
    with pytest.raises(SystemExit) as ended:
        results.main([*places, "--check"])
    assert ended.value.code == 0
    text = page.read_text()
    assert "| 2 | 32.8 | 13.9 | **0.25** | 0.990 | 1 | 50 | 0.1 |" in text
    assert "square to rectangle" in text
    for name in ("maps", "ablations"):
        assert (tmp_path / "images" / f"monge_gap_{name}.png").stat().st_size > 10_000


def test_a_true_map_has_no_error(pairs, monkeypatch):
    class True_(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor([2.0, 0.5])

    monkeypatch.setattr(ablations, "fit", lambda *_: (MongeMap(map=True_()), 1.0))
    row = ablations.row(ablations.read_pairs(pairs / "w2_mix3to10_D2.npz"), ablations.BASE, 0, 1)
    assert row["uvp"] == pytest.approx(0, abs=1e-9)
    assert row["gap"] == pytest.approx(0, abs=1e-9)
    assert 0 <= row["divergence"] < 1


def test_the_interval_is_students():
    low, high = results.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)


def test_the_peer_reads_what_the_suite_left(tmp_path, monkeypatch):
    for module in ("ott", "flax", "optax"):
        pytest.importorskip(module)
    monkeypatch.setattr(suite, "samples", lambda task, seed: tasks.samples(task, seed, train=512, test=64))
    path = suite.prepare("square", 0, tmp_path)
    from benchmarks.science.monge_gap import ott_peer

    ott_peer.main(["--runs", str(tmp_path), "--gaps", "none", "l2", "--updates", "2"])
    for gap in ("none", "l2"):
        assert suite.score(path, path.parent / f"ott_{gap}.npz")["updates"] == 2


def test_the_page_says_what_its_logs_say():
    made = results.blocks(results.read(RESULTS))
    assert marked.differences(results.PAGE, made) == []
