"""The notebooks run from top to bottom, and are kept without their outputs."""

import ast
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_is_one_for_each_half():
    assert [path.stem for path in NOTEBOOKS] == ["large_batch", "monge_map"]


@every_notebook
def test_it_is_kept_without_outputs_and_installs_on_colab_alone(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "colab-badge.svg" in book.cells[0].source
    (install,) = [cell.source for cell in code if "%pip" in cell.source]
    lines = install.splitlines()
    guard = lines.index('if "google.colab" in sys.modules:')
    assert all(line.startswith("    ") or not line for line in lines[guard + 1 :])
    for cell in code:
        if cell.source != install:
            ast.parse(cell.source)


@pytest.mark.slow
@every_notebook
def test_it_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "IPYTHONDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows figures
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
