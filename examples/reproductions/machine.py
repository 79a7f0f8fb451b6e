"""What a log says of the machine that it was made on."""

import platform
from pathlib import Path

__all__ = ["processor"]


def processor() -> str:
    """Return the processor's model, or its architecture where the system does not name one."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    named = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
