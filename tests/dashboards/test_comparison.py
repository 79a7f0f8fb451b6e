"""Runs compared: what the page says is what the files hold."""

import base64
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from logged_runs import csv_run

from lightning_gap.dashboards import render_html
from lightning_gap.dashboards.comparison import better, compare, result_metrics, results_table
from lightning_gap.dashboards.figures import SERIES
from lightning_gap.dashboards.runs import Run, read_runs

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def _series(*values):
    return np.array(list(enumerate(values, 1)), dtype=np.float64)


def _monge(name, cost="euclidean", weight=1.0, gap=0.1):
    prefix = "lightning_gap/monge/"
    metrics = {"val_sinkhorn_divergence": _series(2, 0.5), "val_monge_gap": _series(1, gap), "val_loss": _series(3, 1)}
    return Run(
        name, "CSV", None, {"cost": cost, "gap_weight": weight},
        {prefix + key: value for key, value in metrics.items()}, {prefix + "map": PNG},
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, batch, accuracy, slope in (
        ("small", 64, 0.95, 2.0),
        ("large", 1024, 0.9, 2.1),
        ("plain", 1024, 0.8, 3.0),
    ):
        csv_run(folder / name, batch=batch, accuracy=accuracy, slope=slope)
    return read_runs([folder])


@pytest.fixture(scope="module")
def page(runs):
    return render_html(compare(runs))


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("val_accuracy", "max"), ("test/f1", "max"), ("val_displacement_cosine", "max"), ("val_loss", "min"),
        ("lightning_gap/monge/val_energy_distance", "min"), ("word_error_rate", "min"), ("temperature", None),
        ("lightning_gap/monge/val_displacement", None),
    ],
)  # fmt: skip
def test_names_tell_what_is_better(name, best):
    assert better(name) == best


def test_held_out_metrics_come_first():
    run = Run("r", "CSV", None, metrics=dict.fromkeys(
        ("train_loss", "val_loss", "epoch", "lr-SGD", "val_accuracy", "lightning_gap/regime/x"), _series(1)
    ))  # fmt: skip
    assert result_metrics([run]) == ["val_accuracy", "val_loss", "train_loss"]


def test_the_best_run_is_marked(runs):
    table = results_table(runs, ["val_accuracy", "train_loss"])
    marks = {row.label: [cell.best for cell in cells] for row, cells in zip(table.rows, table.cells(), strict=True)}
    assert marks["small"] == [False, False, True, True]
    assert marks["large"][2] is marks["plain"][2] is False


def test_the_page_names_all_runs_and_their_last_values(runs, page):
    for run in runs:
        assert run.name in page
        assert f"{run.last('val_accuracy'):.4f}" in page


def test_nothing_is_fetched(page):
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert not re.findall(r"https?://(?!www\.w3\.org|purl\.org|creativecommons\.org)", page)
    assert "<script" not in page
    assert "@import" not in page


def test_each_run_keeps_its_colour(page):
    # Runs by name: large, plain, small.
    legends = re.findall(r'<ul class="legend".*?</ul>', page, flags=re.DOTALL)
    assert len(legends) >= 3
    for legend in legends:
        assert re.findall(r"var\(--s(\d)\).*?</svg>(\w+)", legend) == [("0", "large"), ("1", "plain"), ("2", "small")]


def test_distances_are_laid_over_each_other_with_their_laws(page):
    overlay = page[page.index("Ultra-slow diffusion") :]
    svg = overlay[: overlay.index("</svg>")]
    for index in range(3):
        assert f"var(--s{index}, {SERIES[index]})" in svg
    assert svg.count("stroke-dasharray") >= 3
    assert "3.000" in page  # the slope of the third


def test_accuracy_is_shown_by_batch_size(page):
    assert "The generalization gap by batch size" in page


def test_one_batch_size_makes_no_figure_of_batch_sizes(runs):
    assert "by batch size" not in render_html(compare(runs[:1]))


def test_maps_are_in_the_page():
    page = render_html(compare([_monge("one"), _monge("two", gap=0.2)]))
    assert page.count("data:image/png;base64," + base64.b64encode(PNG).decode()) == 2
    assert "one · map" in page


def test_gaps_of_several_costs_are_not_ranked():
    def marked(*runs):
        (section,) = compare(runs).sections
        table = section.blocks[0]
        gap = [column.name for column in table.columns].index("val monge gap")
        return [cells[gap].best for cells in table.cells()]

    assert marked(_monge("one"), _monge("two", gap=0.2)) == [True, False]
    assert marked(_monge("one"), _monge("two", cost="sqeuclidean", gap=0.2)) == [False, False]


def test_a_long_run_is_thinned_and_ends_where_it_ended():
    run = Run("r", "CSV", None, metrics={"val_loss": _series(*np.linspace(1, 0, 50_000))})
    page = render_html(compare([run]))
    assert len(page) < 150_000
    assert "last values: r 0" in page


def test_many_runs_have_lines_of_their_own():
    runs = [Run(f"r{i}", "CSV", None, metrics={"val_loss": _series(1, 1 / (i + 1))}) for i in range(20)]
    legend = re.search(r'<ul class="legend".*?</ul>', render_html(compare(runs)), flags=re.DOTALL)[0]
    lines = re.findall(r"var\(--s(\d)\)\" stroke-width=\"4\"(?: stroke-dasharray=\"([\d ]+)\")?", legend)
    assert len(lines) == len(set(lines)) == 20


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="give at least one"):
        compare([])


def test_a_run_without_anything_has_a_page():
    assert "empty" in render_html(compare([Run("empty", "CSV", None)]))


def test_names_are_escaped():
    assert "<b>x</b>" not in render_html(compare([Run("<b>x</b>", "CSV", None, {"<i>": "</dl>"})]))
