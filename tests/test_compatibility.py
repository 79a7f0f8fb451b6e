"""What goes with what, as the page says it."""

import ast

import compatibility
import pytest
import torch
from compatibility import COMPONENTS, PAGE, STRATEGIES, TESTS
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scipy.optimize import linear_sum_assignment

import lightning_gap
from lightning_gap import costs
from lightning_gap.monge import optimal_transport

CLASSES = {"ddp": DDPStrategy, "fsdp2": ModelParallelStrategy, "fsdp1": FSDPStrategy, "deepspeed": DeepSpeedStrategy}
ARGUMENTS = {"LargeBatchRegime": (4,), "GhostBatchNorm": (4,), "BatchSizeSchedule": ([(0, 4)],)}
CALLBACKS = [
    (name, key)
    for name in ("LargeBatchRegime", "BatchSizeSchedule", "GradientNoiseScale", "GhostBatchNorm", "UltraSlowDiffusion")
    for key in CLASSES
]
NAMED = sorted({test for cells in COMPONENTS.values() for cell in cells.values() for test in cell.tests})


def test_the_page_is_what_the_tests_say():
    assert PAGE.read_text(encoding="utf-8") == compatibility.page(), "run: python tests/compatibility.py"


def test_every_component_has_a_cell_for_every_strategy():
    for cells in COMPONENTS.values():
        assert list(cells) == list(STRATEGIES)


@pytest.mark.parametrize("name", NAMED)
def test_a_test_that_a_cell_names_is_there(name):
    file, _, function = name.partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def refused(name, key):
    callback = getattr(lightning_gap, name)(*ARGUMENTS.get(name, ()))
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    # Accumulation, since a noise scale needs more than one gradient.
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[callback], accumulate_grad_batches=2, **options)
    trainer.strategy.__class__ = CLASSES[key]  # building some of the real ones needs a GPU or several processes
    model = BoringModel()
    model.layer = torch.nn.Sequential(torch.nn.Linear(32, 2), torch.nn.BatchNorm1d(2))
    try:
        callback.setup(trainer, model, stage="fit")
    except MisconfigurationException as error:
        # Past the refusals, a regime asks for the data that a real fit would have.
        return CLASSES[key].__name__ in str(error)
    return False


@pytest.mark.parametrize(("name", "key"), CALLBACKS)
def test_a_callback_refuses_what_the_page_says(name, key):
    assert refused(name, key) == (COMPONENTS[name][key].word == "refused")


@pytest.mark.parametrize("cost", compatibility.every_cost(), ids=lambda cost: str(cost)[:20])
def test_the_exact_solver_is_an_assignment(cost):
    x, y = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if cost == "geodesic":
        x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    matrix = costs.resolve(cost).pairwise(x, y)
    rows, columns = linear_sum_assignment(matrix.numpy())
    value = optimal_transport(x, y, cost=cost, solver="exact").value
    torch.testing.assert_close(value, matrix[rows, columns].mean(), rtol=1e-9, atol=1e-12)
