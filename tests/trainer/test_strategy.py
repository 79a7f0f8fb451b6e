"""Which strategies make their updates by torch's own optimizers, and on whole weights."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lightning_gap.trainer import strategy


@pytest.mark.parametrize(("kind", "whole", "sharded"), [
    (SingleDeviceStrategy, True, False), (DDPStrategy, True, False), (ModelParallelStrategy, False, True),
    (FSDPStrategy, False, False),
])  # fmt: skip
def test_what_a_strategy_holds(kind, whole, sharded):
    trainer = SimpleNamespace(strategy=kind())
    assert strategy.holds_whole_weights(trainer) is whole
    assert strategy.shards_by_dtensor(trainer) is sharded
    assert strategy.leaves_updates_to_torch(trainer) is (whole or sharded)
    assert strategy.strategy_name(trainer) == kind.__name__


def test_ray_s_strategy_is_known_by_its_class():
    """Ray Train's strategies derive from Lightning's, whatever they are called."""
    lightning = pytest.importorskip("ray.train.lightning", reason="needs Ray")
    ddp, sharded = lightning.RayDDPStrategy, lightning.RayFSDPStrategy
    renamed = type("Mine", (ddp,), {})
    for kind in (ddp, renamed):
        trainer = SimpleNamespace(strategy=kind())
        assert strategy.holds_whole_weights(trainer)
        assert strategy.leaves_updates_to_torch(trainer)
        assert not strategy.shards_by_dtensor(trainer)
    assert not strategy.leaves_updates_to_torch(SimpleNamespace(strategy=sharded()))
