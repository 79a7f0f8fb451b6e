"""What ``pyproject.toml`` allows is what ``make test-lowest`` installs and tests."""

import importlib
import pkgutil
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lightning_gap

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    r
    for line in [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]
    if (r := Requirement(line)).name != PROJECT["name"]
]
LOWEST = {
    canonicalize_name(r.name): Version(next(iter(r.specifier)).version)
    for line in (ROOT / "constraints-lowest.txt").read_text().splitlines()
    if not line.startswith("#")
    for r in [Requirement(line)]
}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_lowest_version_is_the_one_that_is_tested(requirement):
    floors = [Version(s.version).release for s in requirement.specifier if s.operator == ">="]
    assert len(floors) == 1
    assert LOWEST[canonicalize_name(requirement.name)].release[: len(floors[0])] == floors[0]


@pytest.mark.parametrize("name", [m.name for m in pkgutil.walk_packages(lightning_gap.__path__, "lightning_gap.")])
def test_every_module_imports(name):
    if not name.endswith("__main__"):
        importlib.import_module(name)


def test_lightning_is_none_of_the_releases_that_ran_code_of_strangers():
    """2.6.2 and 2.6.3 were compromised (GHSA-w37p-236h-pfx3), checkpoints ran code up to 2.6.5 (CVE-2026-58659)."""
    lightning = next(r for r in REQUIREMENTS if r.name == "lightning")
    assert not any(lightning.specifier.contains(f"2.6.{k}") for k in range(6))
    assert lightning.specifier.contains("2.6.6")
