"""The performance page is what its logs say, and the command that makes both works."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import performance, performance_page, scale_figure
from benchmarks.catalogue import PARTS, SCIENCE, SPEED
from benchmarks.logs import RESULTS, read
from benchmarks.marked import differences
from benchmarks.processes import ROOT, run_module

LOGS = performance.read(RESULTS)
# Measures two checkouts, so it has no place in a page.
NOT_RUN = {"speed.against_revision"}


def _run(*words):
    return run_module("benchmarks.performance", *map(str, words), capture_output=True)


def test_the_page_is_what_the_logs_say():
    assert differences(performance.PAGE, performance_page.blocks(LOGS)) == []


@pytest.mark.skipif(not LOGS, reason="no benchmark has been logged yet")
def test_logs_are_of_whole_runs_and_name_no_place():
    for name, log in LOGS.items():
        benchmark = {**SPEED, **SCIENCE}[name]
        assert not log["quick"], name
        assert log["command"] == performance_page.command(benchmark.arguments), name
        assert log["rows"] or not benchmark.rows, name
        text = json.dumps(log)
        assert str(ROOT) not in text, name
        assert "/home/" not in text, name
        assert "/tmp/" not in text, name


def test_every_benchmark_of_the_folder_is_run():
    folder = ROOT / "benchmarks"
    scripts = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for room in ("speed", "science")
        for path in (folder / room).rglob("*.py")
        if "__main__" in path.read_text(encoding="utf-8")
    }
    assert scripts >= PARTS
    assert {one.arguments.split()[0] for one in (*SPEED.values(), *SCIENCE.values())} == scripts - NOT_RUN - PARTS
    assert not set(SPEED) & set(SCIENCE)


@pytest.mark.parametrize("name", SCIENCE)
def test_a_benchmark_of_accuracy_takes_its_arguments_and_has_a_page(name):
    benchmark = SCIENCE[name]
    assert (ROOT / "docs" / "results" / benchmark.page).is_file()
    assert performance.sources(benchmark.arguments.split()[0])  # all that it imports from these folders is found
    for line in {benchmark.arguments, benchmark.quick or benchmark.arguments}:
        options = {word for word in line.split() if word.startswith("--")}
        module = ROOT / "benchmarks" / Path(*line.split()[0].split(".")).with_suffix(".py")
        code = module.read_text(encoding="utf-8")
        assert {option for option in options if f'"{option}"' not in code} == set()
        assert ("add_json(" in code) >= benchmark.rows


def test_the_speed_of_all_takes_three_quarters_of_an_hour_at_most():
    assert sum(one.minutes for one in SPEED.values() if "cuda" not in one.needs) <= 45


def test_a_tiny_run_from_benchmarks_to_the_page(tmp_path, monkeypatch, capsys):
    def said(*words):
        monkeypatch.setattr(sys, "argv", ["performance", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            performance.main()
        out, _ = capsys.readouterr()
        assert not ended.value.code, out
        return out

    logs, page = tmp_path / "logs", tmp_path / "performance.md"
    page.write_text(performance.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    words = ("all", "--quick", "--only", "distance", "maps", "--logs", logs, "--page", page)
    said(*words)
    (log,) = (row for row in read(logs / "performance.jsonl") if row["name"] == "maps")
    assert log["quick"]
    assert log["rows"][0]["map"] == "ResidualMLP"
    assert log["rows"][0]["training, ratio"]["median"] == 1.0
    assert set(log["load"]) == {"before", "after"}
    assert log["others_cores"] is None or 0 <= log["others_cores"] <= log["machine"]["cores"]
    assert {"cpu", "cores", "torch_threads"} <= set(log["machine"])
    assert str(ROOT) not in json.dumps(log)
    shown = page.read_text(encoding="utf-8")
    assert "| StructuredMap, sqeuclidean |" in shown
    assert "| float32 | weight_displacement |" in shown
    assert shown.count("A tiny run, whose numbers mean nothing") == 2
    # What is logged by the same code is not run again.
    assert said("run", *words[1:]).count("logged already") == 2


def test_the_picture_of_seconds_against_samples_has_each_solver_of_the_logs(tmp_path):
    row = {"d": 2, "solver": "dense", "seconds": {"median": 0.5}}
    left_out = {"n": 30, "d": 2, "solver": "dense", "seconds": "left out: no memory"}
    logs = {
        "scale": {"date": "2026-01-02", "rows": [{**row, "n": 20}, {**row, "n": 10}, left_out]},
        "scale_ott": {"date": "2026-01-01", "rows": [{**row, "solver": "ott", "n": 10}]},
        "scale_dims": {"date": "2026-01-01", "rows": [{**row, "solver": "fused", "d": 32, "n": 10}]},
    }
    lines = scale_figure.lines_of(logs)
    assert lines["dense"] == [(10, 0.5), (20, 0.5)]
    assert list(lines) == ["dense", "OTT-JAX", "fused, d = 32, marginal error 0.03"]
    assert set(scale_figure.LOGS) <= set(SPEED)
    pytest.importorskip("matplotlib")
    scale_figure.draw(logs, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 1000


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_GAP_DATA", raising=False)
    done = _run("run", "--quick", "--only", "equal_quality_w2", "--logs", tmp_path)
    assert done.returncode == 0
    assert "skipped, needs" in done.stdout
    assert "--data FOLDER" in done.stdout
    assert not list(tmp_path.iterdir())


def test_spreads_and_cells():
    assert performance_page.text_of({"median": 2.0, "low": 1.5, "high": 3.25, "count": 5}) == "2.00 (1.50 to 3.25)"
    assert performance_page.text_of({"median": 2.0, "low": 2.0, "high": 2.0, "count": 1}) == "2.00"
    assert [performance_page.text_of(v) for v in (1e-5, 0.0123, 12.34, 276.003, 1_000_000, 512, "x")] == [
        "1.0e-05", "0.0123", "12.3", "276", "1,000,000", "512", "x"
    ]  # fmt: skip
