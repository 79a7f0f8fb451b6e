"""What messages tell a user to pass exists on what the user has in hand."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

import lightning_gap

FOLDER = Path(lightning_gap.__file__).parent
_SPEAKERS = {"rank_zero_warn", "rank_zero_info", "warn", "say"}
# `name=` anywhere, and the arguments that a remedy asks for.
_NAMED = re.compile(r"(?:\b([A-Z]\w+)\((?:[^()]*, )?)?\b([a-z]\w*)=")
_ASKED = re.compile(r"\b(?:pass|set|lower|raise|give|increase|use) ([a-z]+_[a-z_]+)\b(?![.(])", re.IGNORECASE)
# Arguments of others that messages may name without their owner: a trainer's, a loader's, an optimizer's, a callback's.
_OTHERS = (
    Trainer,
    DataLoader,
    torch.optim.Adam,
    LightningModule.log,
    ModelCheckpoint,
    EMAWeightAveraging,
    torch.load,
    OneCycleLR,
)
# A scheduler's configuration, attributes of tensors and models, and of what made a layer.
_WORDS = {
    "skip",
    "interval",
    "frequency",
    "requires_grad",
    "track_running_stats",
    "shape",
    "lightning_gap",
    "vectorize",
}


@functools.cache
def parameters(thing):
    try:
        return set(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return set()


def arguments(function):
    every = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    return {argument.arg for argument in every}


@functools.cache
def public():
    """The names of the arguments of all that users can import, and of their methods, by name."""
    found = {}
    for module in pkgutil.walk_packages([str(FOLDER)], "lightning_gap."):
        room = importlib.import_module(module.name)
        for name in getattr(room, "__all__", ()):
            thing = getattr(room, name, None)
            if inspect.isclass(thing):
                methods = [member for key, member in inspect.getmembers(thing, callable) if not key.startswith("_")]
                found[name] = parameters(thing).union(*map(parameters, methods))
            elif callable(thing):
                found[name] = parameters(thing)
    return found


def _face(folder):
    """The public names of the room that a file speaks for."""
    speaks = {"ranks": "ghost"}.get(folder, folder)  # groups of ranks that share ghosts
    package = importlib.import_module("lightning_gap" if speaks.endswith(".py") else f"lightning_gap.{speaks}")
    return getattr(package, "__all__", ())


def spoken(node):
    """The texts within a raised error or a call that warns, placeholders as ``{}``."""
    parts = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.JoinedStr):
            parts |= {id(value) for value in inner.values}
            yield "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in inner.values)
        elif isinstance(inner, ast.Constant) and isinstance(inner.value, str) and id(inner) not in parts:
            yield inner.value


def messages(tree, inside=()):
    """Every message of a file, with the classes and functions around it."""
    for node in ast.iter_child_nodes(tree):
        around = (*inside, node) if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else inside
        if isinstance(node, ast.Raise) or (
            isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in _SPEAKERS
        ):
            for text in spoken(node):
                yield text, around, node.lineno
        yield from messages(node, around)


def unknown(text, around, known, room):
    """The arguments that a message names and that neither what speaks, nor what it names, has."""
    classes = [node.name for node in around if isinstance(node, ast.ClassDef)]
    names = {argument for node in around if isinstance(node, ast.FunctionDef) for argument in arguments(node)}
    for node in around:
        if isinstance(node, ast.ClassDef):
            names |= {n for inner in node.body if isinstance(inner, ast.FunctionDef) for n in arguments(inner)}
    mentioned = known.keys() & set(re.findall(r"\w+", text))
    for name in [*classes, *mentioned]:
        names |= known.get(name, set())
    if not set(classes) & set(room):  # speaks for what users make, which is one of its package's
        names = names.union(*(known[name] for name in room if name in known))
    for other in _OTHERS:
        names |= parameters(other)
    for owner, argument in _NAMED.findall(text):
        if argument not in (known[owner] if owner in known else names | _WORDS):
            yield argument
    yield from (argument for argument in _ASKED.findall(text) if argument not in names | _WORDS)


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_messages_name_arguments_that_exist(path):
    known = public()
    room = _face(path.relative_to(FOLDER).parts[0])
    wrong = [
        f"{path.name}:{line}: {argument} in {text!r}"
        for text, around, line in messages(ast.parse(path.read_text(encoding="utf-8")))
        for argument in unknown(text, around, known, room)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_message_that_names_what_does_not_exist_is_found():
    code = """
class UltraSlowDiffusion:
    def __init__(self, reference=None): ...
    def check(self):
        raise ValueError(f"reference={1}: train longer, or lower minimum_decades")
"""
    (found,) = messages(ast.parse(code))
    assert list(unknown(found[0], found[1], {"UltraSlowDiffusion": {"reference"}}, [])) == ["minimum_decades"]
    assert list(unknown("pass Other(x=1)", (), {"Other": {"y"}}, [])) == ["x"]
