"""Makes this process believe in a cuda:0: before ``import torch``, for good.

``load`` compiles and loads the device guard; ``install`` masks tensors and answers for ``torch.cuda``.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_GUARD = Path(__file__).with_name("guard.cpp")
_MEMORY = 80 << 30
_installed: list[Any] = []


def compiler() -> str | None:
    """Return the C++ compiler, if there is one."""
    return shutil.which("g++")


def load(cache: Path) -> None:
    """Compile the guard, once for each torch, and load it.

    Args:
        cache: Folder for the library.

    Raises:
        RuntimeError: torch has been imported already, there is no compiler, or it failed.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch has been imported before the emulated device: run tests/device by itself")
    found, cxx = importlib.util.find_spec("torch"), compiler()
    if found is None or found.origin is None or cxx is None:
        raise RuntimeError("the emulated device needs torch and g++")
    torch_folder = Path(found.origin).parent
    version = (torch_folder / "version.py").read_bytes()
    key = hashlib.sha256(_GUARD.read_bytes() + version + str(torch_folder).encode()).hexdigest()[:16]
    library = cache / f"guard-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        libraries = torch_folder / "lib"
        command = [
            cxx, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{torch_folder / 'include'}", str(_GUARD),
            "-o", str(unfinished), f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the device guard does not compile against this torch:\n{done.stderr[-4000:]}")
        unfinished.replace(library)  # at once, for another process may be at it
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def install() -> None:
    """Mask all tensors that are made on "cuda" from now on, and let ``torch.cuda`` tell of one device."""
    if _installed:
        return
    import torch
    import torch._dynamo  # asks torch.cuda what it is, on import
    from counts import note
    from masked import Masked, MaskedDevice, dispatch
    from torch.utils._pytree import tree_map

    # torch.tensor(..., device="cuda") passes all modes.
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("empty.memory_format", lambda size, *, dtype=None, **_: Masked(torch.empty(size, dtype=dtype)), "CUDA")
    kernels.impl(
        "empty_strided",
        lambda size, stride, *, dtype=None, **_: Masked(torch.empty_strided(size, stride, dtype=dtype)),
        "CUDA",
    )
    kernels.impl(
        "copy_",
        lambda target, source, non_blocking=False: dispatch(
            torch.ops.aten.copy_.default, (target, source, non_blocking), {}
        ),
        "CUDA",
    )

    def synchronize(*_: Any) -> None:
        note("syncs", "synchronize")

    class Event:
        """All work is done where it is asked for."""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, stream: Any = None) -> None: ...

        def wait(self, stream: Any = None) -> None: ...

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            synchronize()

        def elapsed_time(self, other: "Event") -> float:
            return 0.0

    read = torch.load

    def load_onto(file: Any, map_location: Any = None, **options: Any) -> Any:
        """Load a file, onto the device if that is asked for: its storages cannot be."""
        to_device = isinstance(map_location, (str, torch.device)) and torch.device(map_location).type == "cuda"
        content = read(file, map_location="cpu" if to_device else map_location, **options)
        move = lambda leaf: leaf.to("cuda") if isinstance(leaf, torch.Tensor) else leaf  # noqa: E731
        return tree_map(move, content) if to_device else content

    properties = SimpleNamespace(name="emulated", total_memory=_MEMORY, major=9, minor=0, multi_processor_count=132)
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "emulated",
        "get_device_properties": properties,
        "mem_get_info": (_MEMORY, _MEMORY),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "memory_stats": {},
        "get_rng_state_all": [],
    }
    silent = ("_lazy_init", "set_device", "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state_all")
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    for name in (*silent, "reset_peak_memory_stats", "ipc_collect"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    # All numbers are drawn on the CPU.
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    torch.load = load_onto
    torch.cuda.synchronize = synchronize
    torch.cuda.Event = Event  # type: ignore[assignment,misc]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    # A module's .to() then makes new parameters: the storage of a mask cannot be changed.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    mode = MaskedDevice()
    mode.__enter__()
    _installed.extend((kernels, mode))
