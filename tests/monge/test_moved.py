"""Names of modules that have moved are found where older files look for them."""

import pickle
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import lightning_gap
from lightning_gap.monge import BrenierMap, SamplesDataModule, monge_gap


@pytest.mark.parametrize(
    ("module", "name", "found"),
    [
        ("brenier", "BrenierMap", BrenierMap),
        ("data", "SamplesDataModule", SamplesDataModule),
        ("gap", "monge_gap", monge_gap),
    ],
)
def test_an_old_module_has_the_names_of_the_face(module, name, found):
    old = import_module(f"lightning_gap.monge.{module}")
    with pytest.warns(DeprecationWarning, match=rf"monge\.{module}\.{name} is lightning_gap\.monge\.{name} now"):
        assert getattr(old, name) is found
    with pytest.raises(AttributeError, match=r"has moved, and lightning_gap\.monge has no 'nothing'"):
        old.nothing  # noqa: B018


def test_a_pickle_of_an_old_module_is_read():
    old = b"clightning_gap.monge.brenier\nBrenierMap\n."
    with pytest.warns(DeprecationWarning, match="brenier"):
        assert pickle.loads(old) is BrenierMap


def test_the_package_is_imported_from_an_archive(tmp_path):
    root = Path(lightning_gap.__file__).parent
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in root.rglob("*.py"):
            archive.write(path, path.relative_to(root.parent))
    code = "import lightning_gap, lightning_gap.monge.ot as ot; print(lightning_gap.__file__, ot.__all__)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'all.zip')!r}); {code}"],
        check=True, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert "all.zip" in done.stdout
    assert "monge_gap" in done.stdout
