"""The default map on real data: the pairs, the statistics, and page and log."""

import math

import numpy as np
import pytest
import torch

from benchmarks import marked
from benchmarks.logs import read
from benchmarks.science import default_maps, real_pairs
from benchmarks.science.held_out_energy import difference, unbiased_energy_distance


def test_page_and_log_agree():
    assert not marked.differences(default_maps.PAGE, default_maps.blocks(read(default_maps.LOG)))


def test_the_energy_distance_is_that_of_all_pairs_but_a_sample_with_itself():
    draws = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=draws, dtype=torch.float64) for n in (7, 5))

    def mean_distance(a, b, *, same):
        distances = [(p - q).norm() for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)]
        return float(sum(distances)) / len(distances)

    expected = 2 * mean_distance(x, y, same=False) - mean_distance(x, x, same=True) - mean_distance(y, y, same=True)
    assert unbiased_energy_distance(x, y) == pytest.approx(expected, rel=1e-9)
    of_two = difference(x, 2 * x, y).value
    assert of_two == pytest.approx(unbiased_energy_distance(x, y) - unbiased_energy_distance(2 * x, y), rel=1e-9)


def test_the_standard_error_is_the_spread_over_draws():
    draws = torch.Generator().manual_seed(0)
    found = []
    for _ in range(100):
        x, y = (torch.randn(40, 2, generator=draws, dtype=torch.float64) for _ in range(2))
        found.append(difference(x + 0.5, 1.5 * x, y))
    spread = np.std([one.value for one in found])
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize(
    ("behind", "error", "expected"),
    [(0.0, 0.0, "same"), (0.9, 1, "same"), (1.5, 1, "worse"), (2.5, 1, "**worse**"), (-1.5, 1, "better"),
     (math.nan, 1, "**worse**")],
)  # fmt: skip
def test_verdicts(behind, error, expected):
    assert default_maps.verdict({"difference": behind, "error": error}) == expected


@pytest.fixture
def folder(tmp_path):
    draws = np.random.default_rng(0)
    names = {"train_x": 300, "train_y": 300, "test_x": 90, "test_y": 90}
    moons = {name: draws.normal(size=(n, 2)).astype(np.float32) for name, n in names.items()}
    np.savez(tmp_path / "tutorial_data.npz", **moons)
    n = 700
    np.savez(
        tmp_path / "kang_ifnb.npz", logcounts=draws.normal(size=(n, 25)).astype(np.float16),
        treated=(np.arange(n) % 2).astype(np.int8), patient=draws.choice([101, 107], n).astype(np.int16),
        cell_type=(np.arange(n) // 2 % 2).astype(np.int8), cell_type_names=np.array(["B", "T"]),
    )  # fmt: skip
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_a_row_of_a_pair(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(default_maps.BUDGETS, "500 steps", {"max_steps": 2, "max_epochs": -1})
    names = [pair.name for pair in real_pairs.pairs(folder)]
    assert "tutorial/moons to S" in names
    assert "kang/20 components, by type" in names
    arguments = ["--data", str(folder), "--out", str(tmp_path / "log.jsonl"), "--costs", "sqeuclidean"]
    for only in ("tutorial|by type", "by type"):
        default_maps.main([*arguments, "--only", only])
    rows = read(tmp_path / "log.jsonl")
    assert [row["pair"] for row in rows] == ["kang/20 components, by type", "tutorial/moons to S"]
    for row in rows:
        best = min(row["mean shift"], row["Gaussian map"])
        assert row["difference"] == pytest.approx(row["default"] - best, abs=1e-5)
        assert row["error"] > 0


def test_no_pair_shows_held_out_samples_in_training(folder):
    for pair in real_pairs.pairs(folder):
        for trained, held_out in zip(pair.train, pair.test, strict=True):
            assert not set(map(bytes, trained)) & set(map(bytes, held_out)), pair.name
