"""The README's Python runs as it is written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_both_halves_have_a_block():
    assert len(BLOCKS) == 2
    assert "BatchSizeSchedule" in BLOCKS[0]
    assert "MongeMap" in BLOCKS[1]


SAID = r"^88 updates instead of 256|^test_energy_distance_floor 0\.\d+$"
every_block = pytest.mark.parametrize("block", BLOCKS, ids=["large-batch", "transport"])


@every_block
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("brief_starts")
def test_block_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, README.name, "exec"), {"__name__": "readme"})
    assert re.search(SAID, capsys.readouterr().out, re.M)


@pytest.mark.slow  # and by `make readme`
@every_block
def test_block_runs_by_itself(block, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(SAID, done.stdout, re.M), done.stdout


def test_links_within_the_repository_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (README.parent / target).is_file(), target


def test_the_picture_is_small():
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT):
        assert (README.parent / picture).stat().st_size < 300_000
