"""The benchmarks of training a map do what they say, whatever a MongeMap takes by default."""

import argparse
import ast

import pytest
import torch

from benchmarks import performance
from benchmarks.catalogue import SPEED
from benchmarks.processes import ROOT
from benchmarks.speed import map_to_equal_quality, map_training_shell, transport_training
from lightning_gap.monge import ResidualMLP

FOLDER = ROOT / "benchmarks"
NEVER = argparse.Namespace(steps=2, every=1, limit=60.0, divergence=0.0, gap=0.0, unexplained=1e-9)


@pytest.mark.parametrize("gap", transport_training.GAPS)
def test_a_side_of_ours_trains_on_the_objective_of_both(gap):
    task = transport_training.Task.make(gap, 64, 3, seed=0)
    ours = transport_training.Ours(task)
    assert isinstance(ours.model.map, ResidualMLP)
    assert ours.model.objective.fitting_loss == "sinkhorn"
    before = float(ours.loss(*ours.batches[0]).detach())
    for _ in range(10):
        ours.steps(slice(0, 3))
    assert float(ours.loss(*ours.batches[0]).detach()) < before


def test_moons_of_ours_to_a_level_that_is_never_met():
    found = map_to_equal_quality.one_side("ours", "moons", 0, NEVER)
    assert found["steps"] == 2
    assert not found["reached"]
    assert found["quality"]["divergence"] > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_on_a_large_batch_is_one_of_the_divergence_and_the_gap(monkeypatch):
    maps = []

    def fit(trainer, model, loader):
        maps.append(model)
        return original(trainer, model, loader)

    original = map_training_shell.Trainer.fit
    monkeypatch.setattr(map_training_shell.Trainer, "fit", fit)
    monkeypatch.setattr(map_training_shell, "quiet", lambda: None)
    processor, wall, memory = map_training_shell.large(128, 2)
    assert processor > 0
    assert wall > 0
    assert memory >= 0
    assert {type(model.map) for model in maps} == {ResidualMLP}
    assert {(model.objective.fitting_loss, model.gap_weight) for model in maps} == {("sinkhorn", 1.0)}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_losses_of_a_fit_in_one_process():
    found = map_training_shell.losses(1, 2, 32, 2, **map_training_shell.CASES["divergence and gap"])
    assert found.shape == (1, 2)
    assert torch.isfinite(found).all()


def test_no_benchmark_of_speed_imports_another_as_if_they_were_in_one_folder():
    stems = {path.stem for path in (FOLDER / "speed").glob("*.py")} - {"__init__"}
    assert "transport_training" in stems
    for path in (FOLDER / "speed").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named = {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        assert not (plain | named) & stems, path


@pytest.mark.parametrize("name", SPEED)
def test_the_sources_of_a_benchmark_are_found(name):
    assert performance.sources(SPEED[name].arguments.split()[0])
