"""No module but those of ``trainer/internals`` touches a private name of another package."""

import ast
from pathlib import Path

import lightning_gap

ROOT = Path(lightning_gap.__file__).parent
# Names with an underscore that are public: those of named tuples.
PUBLIC = {"_asdict", "_fields", "_replace"}
# What overrides a method has to have its name, and to call it of its base; no function can stand between.
OVERRIDDEN = {"_apply"}
FILES = sorted(path for path in ROOT.rglob("*.py") if "internals" not in path.parts)


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree):
    """Names that a module gives to something itself: its own attributes are no one else's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


OWN = set().union(*(defined(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES))


def foreign(tree):
    """Yield the private names of others, and where they are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("lightning_gap"):
            names = [*node.module.split("."), *(name.name for name in node.names)]
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif isinstance(node, ast.Import):
            names = [part for name in node.names for part in name.name.split(".")]
            yield from ((node.lineno, name) for name in names if is_private(name))
        elif isinstance(node, ast.Attribute) and node.attr == "aten":
            yield node.lineno, node.attr  # operators whose semantics are assumed
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in PUBLIC:
            own = ast.unparse(node.value) in ("self", "super()")
            if node.attr not in OWN or (node.attr in OVERRIDDEN and not own):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in OWN:
                yield node.lineno, name.value


def test_private_names_of_others_are_in_one_place():
    found = {str(path.relative_to(ROOT)): list(foreign(ast.parse(path.read_text(encoding="utf-8")))) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


def test_a_private_name_of_another_package_is_seen():
    code = "from torch._C import x\nimport torch.utils._pytree\ntrainer._strange\ngetattr(trainer, '_other', None)"
    assert [name for _, name in foreign(ast.parse(code))] == ["_C", "_pytree", "_strange", "_other"]
