"""Transport is torch alone."""

import subprocess
import sys

from lightning_gap.monge import ot

MODULES = ("", ".costs", ".divergence", ".energy", ".gap", ".gaussian", ".marginal", ".solve")


def test_transport_loads_no_lightning():
    code = f"""
import sys
from importlib import import_module
for module in {MODULES}:
    import_module("lightning_gap.monge.ot" + module)
    found = [m for m in sys.modules if m.partition(".")[0] in ("lightning", "torchmetrics")]
    assert not found, (module, found)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_name_of_the_face_is_there():
    assert all(getattr(ot, name) is not None for name in ot.__all__)
    assert "optimal_transport" in ot.__all__
