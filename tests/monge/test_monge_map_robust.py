"""Difficult data: each trains, or stops with a message that says what to change."""

import math

import pytest
import torch
from monge_runs import Metrics, fit_batch, gaussians, small, trainer
from torch import Tensor

from lightning_gap import MongeMap, SamplesDataModule

SOURCE, TARGET = gaussians(40)
CONSTANT = torch.tensor([1.0, 0.0])


def wide(n: int, dim: int) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("source", "target", "options"),
    [
        pytest.param(SOURCE * CONSTANT, TARGET * CONSTANT + 1, {}, id="a constant feature"),
        pytest.param(SOURCE[:4].repeat(10, 1), TARGET[:3].repeat(14, 1), {}, id="duplicate points"),
        pytest.param(SOURCE, torch.ones(40, 2), {"fitting_epsilon": 0.1}, id="a point mass"),
        pytest.param(SOURCE[:1], TARGET[:1], {"fitting_epsilon": 0.1}, id="one sample"),
        pytest.param(wide(30, 512), wide(30, 512) + 1, {"dim": 512}, id="512 dimensions"),
        # Costs of 1e8 in float32 are known to 16 only: said once.
        pytest.param(
            SOURCE, TARGET + 1e4, {}, id="far apart",
            marks=pytest.mark.filterwarnings("ignore::lightning_gap.monge.ConvergenceWarning"),
        ),
        pytest.param(SOURCE * 1e-6, TARGET * 1e-6, {}, id="tiny"),
        pytest.param(SOURCE, TARGET, {"gap_weight": 1e4}, id="a large weight"),
    ],
)  # fmt: skip
def test_it_trains_on(source, target, options):
    watch = Metrics()
    fit_batch(small(**options), (source, target), callbacks=[watch], max_epochs=3)
    for step in watch.train:
        assert all(map(math.isfinite, step.values())), step


@pytest.mark.parametrize(
    ("source", "target", "options", "error", "message"),
    [
        pytest.param(
            SOURCE, torch.ones(40, 2), {}, ValueError,
            "fitting_epsilon cannot be decided from the first training batch: .* give an absolute epsilon",
            id="a point mass",
        ),
        pytest.param(
            SOURCE, TARGET, {"fitting_epsilon": 1e-38}, FloatingPointError, "use a larger epsilon, or float64",
            id="an epsilon too small for float32",
        ),
        pytest.param(
            SOURCE, torch.cat([TARGET[:-2], torch.full((2, 2), math.inf)]), {}, ValueError,
            r"target holds NaN or infinity in 2 of 40 rows \(38, 39\)", id="infinite samples",
        ),
    ],
)  # fmt: skip
def test_it_says_what_to_change(source, target, options, error, message):
    with pytest.raises(error, match=message):
        fit_batch(small(**options), (source, target))


def test_a_diverging_map_is_told_to_lower_its_learning_rate():
    with pytest.raises((ValueError, FloatingPointError), match=r"lower (the|its) learning rate"):
        fit_batch(small(optimizer=lambda p: torch.optim.SGD(p, lr=1e30)), (SOURCE, TARGET), max_epochs=5)


def test_a_large_batch_goes_through_the_blocked_solver():
    source, target = wide(5000, 2), 2 * wide(5000, 2) + 1
    watch = Metrics()
    fit_batch(small(gap_epsilon=1.0, fitting_epsilon=1.0), (source, target), callbacks=[watch], max_steps=1)
    assert math.isfinite(watch.train[0]["train_loss"])


@pytest.mark.compiler
def test_a_compiled_map_trains_as_the_plain_one():
    x = SOURCE[:5]
    images = []
    for compiled in (False, True):
        model = small()
        if compiled:
            model.map.compile(backend="aot_eager")
        data = SamplesDataModule(SOURCE, TARGET, batch_size=16)
        trainer(max_steps=4, max_epochs=-1).fit(model, data)
        images.append(model.transport(x))
        assert set(model.state_dict()) >= {"map.displacement.0.weight"}
    torch.testing.assert_close(*images)


def test_a_map_is_exported():
    model = MongeMap(2, hidden=(8,))
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(model.map.eval(), (SOURCE[:4],), dynamic_shapes=({0: rows},))
    torch.testing.assert_close(program.module()(SOURCE), model.transport(SOURCE))
