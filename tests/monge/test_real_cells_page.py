"""The code of the page on cells runs as it is written, on a small file with the columns it names."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "real_cells.md"
QUIET = 'Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, '


@pytest.fixture
def _file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    anndata, pandas = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    draws = np.random.default_rng(0)
    n, genes = 900, 25
    treated = draws.random(n) < 0.5
    counts = draws.normal(size=(n, genes)) + 2.0 * treated[:, None]
    # Releases of anndata for Python 3.11 cannot write the strings of pandas 3.
    with pandas.option_context("future.infer_string", False):
        obs = pandas.DataFrame({
            "treated": pandas.Categorical(np.where(treated, "stim", "control")),
            "patient": pandas.Categorical(draws.choice(["101", "107", "1015"], n, p=[0.4, 0.1, 0.5])),
        }).set_axis([f"cell{i}" for i in range(n)])  # fmt: skip
        var = pandas.DataFrame(index=[f"gene{i}" for i in range(genes)])
        layers = {"logcounts": counts.astype(np.float32)}
        anndata.AnnData(np.zeros((n, genes), np.float32), obs=obs, var=var, layers=layers).write_h5ad("kang.h5ad")


@pytest.mark.usefixtures("_file")
@pytest.mark.filterwarnings("ignore:target_again has fewer samples")
def test_the_code_runs_as_written(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    found: dict = {}
    for block in blocks:
        assert block.count("Trainer(max_steps=300, ") == ("trainer.fit" in block)
        exec(block.replace("Trainer(max_steps=300, ", f"{QUIET}max_steps=3, "), found)
    assert found["treated_as_predicted"].shape == found["control"].shape
    assert "lightning_gap/monge/test_energy_distance_floor" in found["trainer"].callback_metrics
    assert len(found["linear"]) == len(found["held_out"].source)
