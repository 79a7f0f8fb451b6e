"""Commands of this folder in fresh processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "run_module"]

ROOT = Path(__file__).resolve().parents[1]


def run_module(
    module: str, *words: str, python: str | Path = sys.executable, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module words``, which finds this repository from any folder.

    Args:
        module: Its dotted name.
        *words: Its command line.
        python: The interpreter.
        **options: Of ``subprocess.run``; ``env`` is added to this process's environment.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **options.pop("env", {}), "PYTHONPATH": path}
    return subprocess.run([str(python), "-m", module, *words], text=True, env=environment, **options)
