"""The house: what a reader may rely on when looking for the place of a thing."""

import ast
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import lightning_gap

ROOT = Path(lightning_gap.__file__).parent
FILES = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
TREES = {path: ast.parse(text) for path, text in FILES.items()}
LINES = {path: text.count("\n") for path, text in FILES.items()}

# What each room may import of the package besides itself; a room that is not named may import all.
BELOW = {
    "checks": set(),
    "extras": set(),
    "faces": set(),
    "native": set(),
    "precision": set(),
    "ranks": {"trainer.internals"},
    "trainer": {"ranks"},
    "regime": {"trainer", "ranks", "checks", "faces"},
    "ghost": {"trainer", "ranks", "checks", "precision", "faces", "native"},
    "diffusion": {"trainer", "ranks", "checks", "precision", "faces", "extras"},
    "dashboards": {"checks", "extras", "trainer"},
    "monge": {"trainer", "ranks", "checks", "precision", "faces", "extras", "native"},
    "monge.ot": {"checks", "precision", "ranks", "trainer.internals", "extras", "faces", "native"},
    "monge.maps": {"monge.ot", "checks", "precision", "trainer.internals"},
    "monge.scores": {"faces", "monge.ot", "monge.maps", "checks", "precision", "extras", "ranks", "trainer"},
    "monge.cells": {"faces", "monge.samples", "monge.scores", "checks", "extras"},
    "monge.samples": {"faces", "monge.ot", "checks", "precision", "extras", "ranks", "trainer"},
}


def module_of(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in FILES}


def imported(path, *, deferred=True):
    """The modules of the package that a file imports, without its name; ``deferred``: within functions, too."""
    found = set()
    stack = list(TREES[path].body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not deferred:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{name.name}" for name in node.names]
            names = [name if name.removeprefix("lightning_gap.") in MODULES else node.module for name in whole]
        found |= {name.removeprefix("lightning_gap.") for name in names if name.startswith("lightning_gap.")}
        stack += ast.iter_child_nodes(node)
    return found


def within(module, rooms):
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def test_no_file_is_long():
    assert {str(path): n for path, n in LINES.items() if n > 400} == {}
    assert statistics.median(LINES.values()) <= 150


def test_no_class_is_a_floor():
    classes = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert {name: n for name, n in classes.items() if n > 350} == {}


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=str)
def test_a_face_is_one_screen(path):
    assert LINES[path] <= 60


@pytest.mark.parametrize("room", BELOW)
def test_arrows_point_down(room):
    wrong = {
        f"{path} -> {module}"
        for path in FILES
        if within(module_of(path), [room])
        for module in imported(path)
        if not within(module, [room, *BELOW[room]])
    }
    assert wrong == set()


def test_nothing_goes_in_circles():
    arrows = {module_of(path): {m for m in imported(path, deferred=False) if m in MODULES} for path in FILES}
    reached = defaultdict(set)
    for start in arrows:
        stack = [start]
        while stack:
            for below in arrows[stack.pop()] - reached[start]:
                reached[start].add(below)
                stack.append(below)
    assert sorted(module for module in arrows if module in reached[module]) == []


WITHOUT_LIGHTNING = (
    "monge.ot", "monge.maps", "ghost.functional", "ghost.layers", "diffusion.distance", "ranks.group",
    "trainer.internals",
)  # fmt: skip


def test_the_mathematics_loads_no_lightning():
    code = f"""
import sys
from importlib import import_module
for module in {WITHOUT_LIGHTNING}:
    import_module("lightning_gap." + module)
    loaded = {{m.partition(".")[0] for m in sys.modules}}
    print(module, sorted(loaded & {{"lightning", "lightning_fabric", "pytorch_lightning"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{module} []" for module in WITHOUT_LIGHTNING]
