"""The comparison of two checkouts: each is measured by its own package."""

import json

import pytest

from benchmarks.processes import ROOT, run_module


def _run(*words):
    return run_module("benchmarks.speed.against_revision", *map(str, words), capture_output=True)


@pytest.mark.parametrize("groups", [["ghost"], pytest.param(["ghost", "transport"], marks=pytest.mark.slow)])
def test_a_tree_against_itself(tmp_path, groups):
    rows = tmp_path / "rows.json"
    done = _run("--before", ROOT, "--turns", 1, "--quick", "--only", *groups, "--json", rows)
    assert done.returncode == 0, done.stderr
    found = json.loads(rows.read_text())
    assert {row["group"] for row in found} == set(groups)
    assert all(0.01 < row["ratio"]["median"] < 100 and row["ratio"]["count"] == 1 for row in found)
    assert "| ghost | 1-d, ghosts of 32, contiguous |" in done.stdout


def test_a_folder_without_the_package_is_refused(tmp_path):
    done = _run("--before", tmp_path)
    assert done.returncode == 2
    assert "give the folder of a checkout" in done.stderr
