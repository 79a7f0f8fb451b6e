"""The public face: names, laziness, one version."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gap

ROOT = Path(lightning_gap.__file__).parent


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", lightning_gap.__all__)
def test_each_public_name_imports(name):
    assert getattr(lightning_gap, name) is not None


def test_star_import_brings_all_names():
    names = {}
    exec("from lightning_gap import *", names)
    assert set(lightning_gap.__all__) <= set(names)


def test_dir_lists_all_names():
    assert set(lightning_gap.__all__) <= set(dir(lightning_gap))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        lightning_gap.Nothing  # noqa: B018


def test_each_name_says_where_it_lives():
    tree = ast.parse(Path(lightning_gap.__file__).read_text(encoding="utf-8"))
    for home in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
        if home.module.startswith("lightning_gap.") and home.module != "lightning_gap.faces":
            assert {name.name for name in home.names} <= set(importlib.import_module(home.module).__all__)


def test_import_loads_nothing_that_is_used_later():
    heavy = ("geomloss", "pykeops", "wandb", "matplotlib", "sklearn", "torch", "lightning", "numpy")
    assert _python(f"import sys, lightning_gap; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_no_room_loads_what_it_may_not_need():
    code = """
import sys
import lightning.pytorch
before = set(sys.modules)
import lightning_gap.regime, lightning_gap.ghost, lightning_gap.diffusion, lightning_gap.monge
import lightning_gap.dashboards, lightning_gap.cli
heavy = {"geomloss", "pykeops", "wandb", "matplotlib", "sklearn", "mlxtend", "PIL"}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    assert _python(code).strip() == "[]"


def test_the_version_is_written_once():
    pattern = re.compile(r"(?<![\w.])" + re.escape(lightning_gap.__version__) + r"(?![\w.])")
    files = [*ROOT.rglob("*.py"), ROOT.parent / "pyproject.toml", ROOT.parent / "CITATION.cff"]
    holders = [path.name for path in files if path.exists() and pattern.search(path.read_text(encoding="utf-8"))]
    assert holders == ["__init__.py"]


def test_modules_are_named_for_what_they_hold():
    forbidden = {"utils", "util", "helpers", "helper", "manager", "misc", "common"}
    assert not [path for path in ROOT.rglob("*.py") if path.stem in forbidden]


def test_types_are_shipped():
    assert (ROOT / "py.typed").is_file()


def test_every_module_says_what_it_exports():
    for path in ROOT.rglob("*.py"):
        assert "__all__" in path.read_text(encoding="utf-8"), f"{path} has no __all__"
