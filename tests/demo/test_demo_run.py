"""The demo from end to end, small: the real data, networks and callbacks, fewer steps."""

import io
import json
import logging
import math

import pytest
import torch
from brief import begin_briefly
from rich.console import Console

from lightning_gap.demo import ColourSettings, DemoSettings, LargeBatchSettings, run_demo
from lightning_gap.demo.datasets import photographs
from lightning_gap.demo.large_batch import RECIPES, Classifier

for module in ("matplotlib", "mlxtend", "sklearn"):
    pytest.importorskip(module)
Image = pytest.importorskip("PIL.Image")
SETTINGS = LargeBatchSettings(epochs=4, large_batch=512, seeds=(0, 1), width=16)


def small(pictures):
    """Every fourth pixel of each row, of every fourth row."""
    return {name: picture[::4, ::4] for name, picture in pictures.items()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    screen = io.StringIO()
    level = logging.getLogger("lightning.pytorch").level
    settings = DemoSettings(
        output=output,
        large_batch=SETTINGS,
        colours=ColourSettings(iterations=3, batch_size=16, pixels=200, held_out=50),
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        begin_briefly(monkeypatch)
        monkeypatch.setattr("lightning_gap.demo.run.photographs", lambda: small(photographs()))
        report = run_demo(settings, Console(file=screen, width=100))
    assert logging.getLogger("lightning.pytorch").level == level
    return report, screen.getvalue(), json.loads((output / "results.json").read_text(encoding="utf-8"))


def test_it_ends_by_naming_the_report(demo):
    report, screen, _ = demo
    assert report.is_file()
    assert screen.rstrip().endswith(str(report))


def test_the_screen_has_both_tables_and_no_noise(demo):
    _, screen, _ = demo
    for said in (*(recipe.name for recipe in RECIPES), "Sinkhorn", "Displacement", "Large-batch regime"):
        assert said in screen
    for noise in ("GPU available", "Tip", "warn", "does not have many workers"):
        assert noise not in screen


def test_every_recipe_ran_with_every_seed(demo):
    runs = demo[2]["large_batch"]
    assert list(runs) == [recipe.name for recipe in RECIPES]
    assert all([run["seed"] for run in several] == [0, 1] for several in runs.values())


def test_the_regime_gives_the_large_batch_the_updates_of_the_small_one(demo):
    updates = {name: several[0]["updates"] for name, several in demo[2]["large_batch"].items()}
    # 4,000 images: 32 updates an epoch at 128, 8 at 512.
    assert list(updates.values()) == [128, 32, 128, 128]
    plan = demo[2]["large_batch"]["+ regime"][0]["plan"]
    assert plan["learning_rates"] == [[0.1, pytest.approx(0.2)]]


def test_each_run_learned(demo):
    for several in demo[2]["large_batch"].values():
        for run in several:
            assert run["test_accuracy"] > 30
            assert run["train_loss"] < math.log(10)
            assert len(run["curve"]) == 4
            assert run["distances"][-1][1] > 0
            assert run["diffusion"]["log_slope"] > 0


def test_colours_were_learned_and_saved(demo):
    report, _, numbers = demo
    assert [(one["source"], one["target"]) for one in numbers["colour_transfer"]] == [
        ("china", "flower"),
        ("flower", "china"),
    ]
    for one in numbers["colour_transfer"]:
        assert [each["gap_weight"] for each in one["maps"]] == [0.0, 1.0]
        for each, word in zip(one["maps"], ("without", "with"), strict=True):
            assert each["divergence"] < one["before"]["divergence"]
            assert each["displacement"] > 0
            with Image.open(report.parent / f"{one['source']}_to_{one['target']}_{word}_gap.png") as picture:
                assert picture.size == (160, 107)


def test_the_report_holds_every_number_of_the_tables(demo):
    report, _, numbers = demo
    page = report.read_text(encoding="utf-8")
    for several in numbers["large_batch"].values():
        mean = sum(run["test_accuracy"] for run in several) / len(several)
        assert f"{mean:.2f}" in page
    for one in numbers["colour_transfer"]:
        assert all(f"{each['displacement']:.3f}" in page for each in one["maps"])
    assert page.count("<img") == 8


@pytest.mark.usefixtures("brief_starts")
def test_same_seed_same_numbers(tmp_path):
    from lightning_gap.demo.colour_transfer import transfer_colours

    settings = ColourSettings(iterations=2, batch_size=32, pixels=50, held_out=50)
    pictures = small(photographs())
    first, second = (transfer_colours(pictures, "china", "flower", settings, lambda *_: None) for _ in range(2))
    assert first.scores == second.scores


def test_the_network_is_the_papers():
    layers = list(Classifier(10).network)
    assert [layer.out_features for layer in layers if isinstance(layer, torch.nn.Linear)] == [512] * 5 + [10]
    assert sum(isinstance(layer, torch.nn.BatchNorm1d) for layer in layers) == 5
    made = Classifier(50).configure_optimizers()
    assert sorted(made["lr_scheduler"].milestones) == [10, 20, 30]
    assert made["optimizer"].defaults["lr"] == 0.1
