"""What a log says of the machine that it was made on."""

import json
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["busy", "machine", "processor", "versions"]

# Distributions whose versions a log holds.
VERSIONS = ("torch", "lightning", "numpy", "geomloss", "pykeops", "POT", "ott-jax", "jax")


def processor() -> str:
    """Return the processor's model, or its architecture where the system does not name one."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    named = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def machine() -> dict[str, Any]:
    """Describe this machine in words, without its name."""
    import torch

    described: dict[str, Any] = {
        "cpu": processor(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        described["memory_GB"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9)
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def versions(python: str) -> dict[str, str]:
    """Return the versions of what a Python computes with."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        f"found = {{name: version(name) for name in {VERSIONS!r}}}\n"
        "print(json.dumps({'Python': platform.python_version()} | {k: v for k, v in found.items() if v}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def busy() -> float | None:
    """Return the seconds that all cores have worked for others than the processes that this one has waited for."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    mine = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return worked - mine.ru_utime - mine.ru_stime
