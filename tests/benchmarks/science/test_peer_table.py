"""The table of other libraries' maps: from rows to the page, and the page and its logs."""

import json

import pytest

from benchmarks import marked
from benchmarks.logs import RESULTS
from benchmarks.science.peers import table


def row(solver, dim, uvp, seed=None, pairs="w2", **more):
    return {
        "solver": solver,
        "pairs": pairs,
        "dim": dim,
        "seed": seed,
        "uvp": uvp,
        "cosine": 0.5,
        "cpu_seconds": 3.0,
    } | more


def test_page_and_logs_agree():
    assert marked.differences(table.PAGE, table.blocks(table.read(RESULTS))) == []


def test_own_rows_and_the_peers_come_from_their_logs(tmp_path):
    for name, solver in (
        ("known_maps.jsonl", "ours"),
        ("known_maps_best.jsonl", "best"),
        ("peer_maps.jsonl", "OTT ProgOT"),
    ):
        (tmp_path / name).write_text(json.dumps(row(solver, 2, 1.0)) + "\n", "utf-8")
    (tmp_path / "monge_gap_known_maps.jsonl").write_text(json.dumps(row("another", 2, 1.0)) + "\n", "utf-8")
    assert {found["solver"] for found in table.read(tmp_path)} == {"ours", "best", "OTT ProgOT"}


def test_rows_of_other_benchmarks_are_taken_where_the_samples_are_the_same(tmp_path):
    (tmp_path / "known_maps.jsonl").write_text(json.dumps(row("ours", 2, 1.0, pairs="mix3to10")) + "\n", "utf-8")
    rows = [
        {"cost": cost, "D": 8, "map": "default", "seed": seed, "uvp": 2.0, "cosine": 0.9, "seconds": 60.0}
        for cost, seed in (("euclidean", 0), ("euclidean", 1), ("pnorm(p=1.5)", 0), ("pnorm(p=3.0)", 0))
    ]
    (tmp_path / "known_costs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")
    found = {(one["solver"], one["pairs"], one["dim"], one["seed"]) for one in table.read(tmp_path)}
    ours = "MongeMap, default"
    assert found == {("ours", "w2", 2, None), (ours, "rays", 8, 0), (ours, "powers", 8, 0)}


def test_floors_come_first_then_own_rows_then_peers():
    names = ["POT EMDTransport, n = 9", "ours", "OTT ProgOT, n = 9", "mean shift", "identity"]
    ordered = ["identity", "mean shift", "ours", "OTT ProgOT, n = 9", "POT EMDTransport, n = 9"]
    assert table.solvers([row(name, 2, 1.0) for name in names]) == ordered


def test_seeds_become_a_median_with_its_range_and_no_row_is_left_out():
    rows = [row("OTT ProgOT", 2, error, seed) for seed, error in enumerate((3.0, 1.0, 2.0))]
    rows += [row("identity", 8, 59.0), row("ours", 32, 1234.0, 0), row("refusing", 4, None, note="not for this cost")]
    made = table.blocks(rows)
    lines = {line.split(" | ")[0].strip("| *"): line for line in made["w2"].splitlines()}
    assert "| 2 (1 to 3) | not run |" in lines["OTT ProgOT"]
    assert lines["OTT ProgOT"].endswith("| 3 | 3 |")
    assert "1,234" in lines["ours"]
    assert "refused" in lines["refusing"]
    assert "not for this cost" in made["configurations"]
    assert "MM:R, published" in lines


@pytest.mark.parametrize(
    ("curve", "seconds"), [([[5, 9, 12.0], [6, 10, 10.0], [7, 11, 11.0]], (6, 10)), ([[1, 1, 30.0]], None)]
)
def test_time_to_an_error_is_the_first_one_below_it(curve, seconds):
    assert table.seconds_to(curve) == seconds


def test_times_say_who_never_gets_there():
    curves = {"fast": [[5, 9, 12.0], [6, 10, 9.0]], "slow": [[5, 9, 30.0]]}
    made = table.blocks([row(name, 8, curve[-1][2], 0, curve=curve) for name, curve in curves.items()])["time"]
    assert "| fast | 6 | 10 |" in made
    assert "| slow | never | never |" in made
