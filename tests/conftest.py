"""What holds for every test."""

import gc
import inspect
import logging
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from brief import begin_briefly


@pytest.fixture(autouse=True)
def threads_are_left_as_they_were():
    """A process that is forked when torch has used several threads hangs at the next use of them."""
    torch = sys.modules.get("torch")  # not imported here: an emulated device has to be there first
    before = torch.get_num_threads() if torch else None
    yield
    if torch and torch.get_num_threads() != before:
        now = torch.get_num_threads()
        torch.set_num_threads(before)
        pytest.fail(f"a test left {now} threads where there were {before}")


LOGGERS = ("", "lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")


def _who_is_heard() -> dict[str, Any]:
    loggers = {name: logging.getLogger(name) for name in LOGGERS}
    state = {name: (each.level, each.disabled, each.propagate) for name, each in loggers.items()}
    said_by = sys.modules.get("lightning_utilities.core.rank_zero")
    rank = getattr(said_by.rank_zero_only, "rank", 0) if said_by else 0
    return state | {"disabled up to": logging.root.manager.disable, "rank": rank}


@pytest.fixture(autouse=True)
def what_is_said_can_be_heard_by_the_next():
    """A logger that is left silent, or a rank that is not 0, makes another test miss what it waits for."""
    imported = "lightning.pytorch" in sys.modules  # which sets the levels of its loggers
    before = _who_is_heard()
    yield
    after = _who_is_heard()
    changed = [f"{name!r} at {after[name]}" for name in after if after[name] != before[name]]
    if imported and changed:
        pytest.fail(f"a test left {', '.join(changed)}")


@pytest.fixture
def brief_starts(monkeypatch):
    """What :func:`brief.begin_briefly` does, for one test."""
    begin_briefly(monkeypatch)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Any:
    """What is imported and collected is never garbage: the search for it is among what tests make."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        _forget_source_lines()


def _forget_source_lines() -> None:
    """Give Lightning, which looks through the stack at each ``load_from_checkpoint``, its files without their source.

    It asks whether it is being scripted. To find the lines of each frame took a tenth of the tests' time.
    """
    loading = sys.modules.get("lightning.pytorch.utilities.model_helpers")
    if loading is not None and hasattr(loading, "inspect"):
        loading.inspect = SimpleNamespace(stack=partial(inspect.stack, 0))
