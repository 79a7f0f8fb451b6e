"""Transport is torch alone."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["", ".costs", ".divergence", ".energy", ".gap", ".gaussian", ".marginal", ".solve"])
def test_transport_loads_no_lightning(module):
    code = (
        f"import sys, lightning_gap.monge.ot{module}; "
        "assert not [m for m in sys.modules if m.partition('.')[0] in ('lightning', 'torchmetrics')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
