"""The face of the maps, and arguments by their old names."""

import subprocess
import sys

import pytest

from lightning_gap.monge import maps
from lightning_gap.monge.maps import BrenierMap, ConditionalMap, SphereMap, StructuredMap


def test_the_face_has_the_function_and_no_lightning():
    code = """
import sys
import lightning_gap.monge.maps
import lightning_gap.monge.maps.conservativity
print(callable(lightning_gap.monge.maps.conservativity), any(m.split(".")[0] == "lightning" for m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"]
    assert all(hasattr(maps, name) for name in maps.__all__)


@pytest.mark.parametrize("map_class", [ConditionalMap, StructuredMap, SphereMap])
def test_conditions_by_their_old_name(map_class):
    with pytest.warns(DeprecationWarning, match="conditions is called num_conditions now"):
        old = map_class(3, hidden=(4,), conditions=2)
    assert old.hparams == map_class(3, hidden=(4,), num_conditions=2).hparams == map_class(**old.hparams).hparams
    assert old.conditions == old.num_conditions == old.hparams["num_conditions"] == 2
    with pytest.raises(TypeError, match="conditions is the old name of num_conditions"):
        map_class(3, conditions=2, num_conditions=2)
    # As checkpoints of an older version have them.
    assert map_class(3, conditions=None, condition_dim=1).num_conditions is None


def test_the_plans_epsilon_by_its_old_name():
    with pytest.warns(DeprecationWarning, match="plan_epsilon is called plan_relative_epsilon now"):
        old = BrenierMap(2, (4,), plan_epsilon=0.1)
    assert old.hparams == BrenierMap(2, (4,), plan_relative_epsilon=0.1).hparams == BrenierMap(**old.hparams).hparams
