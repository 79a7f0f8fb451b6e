"""The performance page is what its logs say, and the command that makes both works."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "performance.py"
sys.path.insert(0, str(SCRIPT.parent))
performance = importlib.import_module("performance")
LOGS = performance.read(performance.LOGS)


def _run(*words):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True)


def test_the_page_is_what_the_logs_say():
    assert performance.differences(performance.PAGE, performance.blocks(LOGS)) == []


@pytest.mark.skipif(not LOGS, reason="no benchmark has been logged yet")
def test_logs_are_of_whole_runs_and_name_no_place():
    for name, log in LOGS.items():
        benchmark = {**performance.SPEED, **performance.SCIENCE}[name]
        assert not log["quick"], name
        assert log["command"] == performance.command(benchmark.arguments), name
        assert log["rows"] or not benchmark.rows, name
        text = json.dumps(log)
        assert str(ROOT) not in text, name
        assert "/home/" not in text, name
        assert "/tmp/" not in text, name


def test_every_benchmark_of_the_folder_is_run():
    scripts = {path.name for path in SCRIPT.parent.glob("*.py")} - {"performance.py", "measurements.py"}
    known = {one.arguments.split()[0] for one in (*performance.SPEED.values(), *performance.SCIENCE.values())}
    assert known == scripts


def test_the_speed_of_all_takes_half_an_hour_at_most():
    assert sum(one.minutes for one in performance.SPEED.values() if "cuda" not in one.needs) <= 30


def test_a_tiny_run_from_benchmarks_to_the_page(tmp_path):
    logs, page = tmp_path / "logs", tmp_path / "performance.md"
    page.write_text(performance.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    words = ("all", "--quick", "--only", "distance", "maps", "--logs", logs, "--page", page)
    done = _run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    log = json.loads((logs / "maps.json").read_text(encoding="utf-8"))
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
    again = _run("run", *words[1:])
    assert again.stdout.count("logged already") == 2


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("LIGHTNING_GAP_DATA", raising=False)
    done = _run("run", "--quick", "--only", "equal_quality_w2", "--logs", tmp_path)
    assert done.returncode == 0
    assert "skipped, needs" in done.stdout
    assert "--data FOLDER" in done.stdout
    assert not list(tmp_path.iterdir())


def test_spreads_and_cells():
    assert performance.text_of({"median": 2.0, "low": 1.5, "high": 3.25, "count": 5}) == "2.00 (1.50 to 3.25)"
    assert performance.text_of({"median": 2.0, "low": 2.0, "high": 2.0, "count": 1}) == "2.00"
    assert [performance.text_of(v) for v in (1e-5, 0.0123, 12.34, 276.003, 1_000_000, 512, "x")] == [
        "1.0e-05", "0.0123", "12.3", "276", "1,000,000", "512", "x"
    ]  # fmt: skip
