"""Batch normalization that is no layer of torch's classes: what a conversion cannot reach, found to be named."""

import dis
from collections import Counter
from itertools import pairwise
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["calls_batch_norm", "frozen_layers", "scripted_layers"]


def scripted_layers(module: nn.Module) -> dict[nn.Module, str]:
    """Return the outermost modules of ``torch.jit`` that hold BatchNorm layers, with what is to be said of them."""
    found: dict[nn.Module, str] = {}
    inside: set[nn.Module] = set()
    for outer in module.modules():  # parents come first
        if isinstance(outer, torch.jit.ScriptModule) and outer not in inside:
            inner = list(outer.modules())
            inside.update(inner)
            if count := sum("BatchNorm" in getattr(layer, "original_name", "") for layer in inner):
                found[outer] = f"is compiled by torch.jit, with {count} BatchNorm layers in it; convert first"
    return found


def frozen_layers(module: nn.Module) -> str:
    """Return what a module has of frozen batch normalization, as in detection backbones: ``"4 FrozenBatchNorm2d"``."""
    names = (type(layer).__name__ for layer in module.modules())
    counts = Counter(name for name in names if "FrozenBatchNorm" in name)
    return " and ".join(f"{count} {name}" for name, count in counts.items())


def calls_batch_norm(cls: type[nn.Module]) -> bool:
    """Return whether a method of a module class, one of torch's own left out, calls torch's ``batch_norm``."""
    for base in cls.__mro__:
        if base is nn.Module or base.__module__.partition(".")[0] in ("torch", "lightning"):
            continue
        if any(isinstance(method, FunctionType) and _calls(method) for method in vars(base).values()):
            return True
    return False


def _calls(method: FunctionType) -> bool:
    if "batch_norm" not in method.__code__.co_names:
        return False
    known = method.__globals__
    for before, this in pairwise(dis.get_instructions(method)):
        if this.argval != "batch_norm":
            continue
        if this.opname == "LOAD_GLOBAL":
            if known.get("batch_norm") is F.batch_norm:
                return True
        elif before.argval == "functional" or known.get(str(before.argval)) in (F, torch):  # and no layer of that name
            return True
    return False
