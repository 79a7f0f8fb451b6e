"""Comparisons of the package on a device with the package on the CPU.

With ``EMULATED_DEVICE=1`` the device is an emulated cuda:0, and these are ``compiler`` tests (``make test-device``).
Else it is a real one, and they are ``gpu`` tests (``make test-gpu``), skipped where there is none.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EMULATED = os.environ.get("EMULATED_DEVICE", "0") not in ("", "0")

if EMULATED:
    import emulation

    if emulation.compiler() is not None:
        # Here, not in a hook: what follows imports torch.
        emulation.load(HERE.parents[1] / ".pytest_cache" / "emulated_device")
        emulation.install()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "emulated: of the emulated device alone: what it counts, and its switches")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say of each test here what it needs."""
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        if EMULATED:
            item.add_marker(pytest.mark.compiler)
            if emulation.compiler() is None:
                item.add_marker(pytest.mark.skip(reason="an emulated device needs g++"))
        else:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(
                pytest.mark.skipif(not _has_gpu(), reason="needs a GPU, or make test-device: an emulated one")
            )
            if item.get_closest_marker("emulated"):
                item.add_marker(pytest.mark.skip(reason="counts or replays what only an emulated device shows"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def device() -> str:
    """The device that is compared with the CPU."""
    return "cuda"


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    import torch

    torch.manual_seed(0)
    if not EMULATED:
        torch.backends.cudnn.allow_tf32 = False  # or convolutions agree with the CPU's to three digits only
    yield
    torch.set_default_device(None)
