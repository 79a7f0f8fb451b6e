"""Transport is torch alone."""

import subprocess
import sys

import pytest

from lightning_gap.monge import ot


@pytest.mark.parametrize("module", ["", ".costs", ".divergence", ".energy", ".gap", ".gaussian", ".marginal", ".solve"])
def test_transport_loads_no_lightning(module):
    code = (
        f"import sys, lightning_gap.monge.ot{module}; "
        "assert not [m for m in sys.modules if m.partition('.')[0] in ('lightning', 'torchmetrics')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_name_of_the_face_is_there():
    assert all(getattr(ot, name) is not None for name in ot.__all__)
    assert "optimal_transport" in ot.__all__
