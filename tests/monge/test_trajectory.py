"""Chains of maps through populations at several times."""

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from monge_runs import FAST, small
from torch import nn

from lightning_gap import MongeMap
from lightning_gap.monge import ConditionalMap, ResidualMLP, Trajectory, fit_trajectory, gaussian_map, held_out_times


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def affine(source, target, start="gaussian", **options):
    net = ResidualMLP(source.shape[1], (4,), start=start).to(source.dtype)
    net.start(source, target)
    return MongeMap(map=net, **options)


DAYS = [normal(300, 2, seed=k).double() @ torch.diag(torch.tensor([1.0 + k, 1.0]).double()) + 3 * k for k in range(3)]
TIMES = [1, 2, 5]


@pytest.fixture
def trajectory():
    return Trajectory([affine(DAYS[0], DAYS[1]), affine(DAYS[1], DAYS[2])], TIMES)


@pytest.mark.parametrize("t", [1, 1.25, 2, 3.5, 5])
@pytest.mark.parametrize("since", [1, 1.5, 2, 4, 5])
def test_gaussians_go_through_closed_forms_forwards_and_backwards(trajectory, since, t):
    def closed(time):  # the matrix and the offset of the way from the first population
        matrix, offset = torch.eye(2).double(), torch.zeros(2).double()
        for k in range(2):
            share = min(max((time - TIMES[k]) / (TIMES[k + 1] - TIMES[k]), 0), 1)
            A, b = gaussian_map(DAYS[k], DAYS[k + 1])
            part, shift = (1 - share) * torch.eye(2) + share * A, share * b
            matrix, offset = matrix @ part, offset @ part + shift
        return matrix, offset

    x = normal(20, 2, seed=9).double()
    (A, b), (C, e) = closed(since), closed(t)
    torch.testing.assert_close(trajectory.at(x @ A + b, t, since=since), x @ C + e, rtol=0, atol=1e-5)


def test_several_times_are_a_stack_in_their_order(trajectory):
    points = trajectory.at(DAYS[0], [5, 1, 3.0])
    assert points.shape == (3, 300, 2)
    torch.testing.assert_close(points[1], DAYS[0])
    torch.testing.assert_close(points[2], trajectory.at(DAYS[0], 3))
    assert trajectory.at(DAYS[0].numpy(), np.array([2, 5])).shape == (2, 300, 2)


@pytest.mark.parametrize(("t", "since"), [(0, None), (6, None), ([2, 9], None), (2, 0.5), (2, float("nan"))])
def test_times_outside_are_refused(trajectory, t, since):
    with pytest.raises(ValueError, match=r"(t|since) must be"):
        trajectory.at(DAYS[0], t, since=since)


def test_conditions_go_by_name():
    torch.manual_seed(0)
    maps = []
    for names in (["a", "b"], ["b", "a"]):
        net = ConditionalMap(2, (8,), num_conditions=2)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.2)
        maps.append(MongeMap(map=net, condition_names=names))
    x, condition = normal(6, 2), ["a", "b", "b", "a", "a", "b"]
    end = Trajectory(maps, [0, 1, 2]).at(x, 2, condition=condition)
    torch.testing.assert_close(end, maps[1].transport(maps[0].transport(x, condition), condition))


def test_one_file_holds_all_and_runs_nothing(trajectory, tmp_path):
    trajectory.save(tmp_path / "days.maps")
    again = Trajectory.load(tmp_path / "days.maps")
    assert again.times == trajectory.times
    # Weights come back in the network's precision, which is single here by default.
    x = DAYS[0].float()
    torch.testing.assert_close(again.at(x, 4), trajectory.at(DAYS[0], 4).float(), rtol=1e-4, atol=1e-4)
    assert set(torch.load(tmp_path / "days.maps", weights_only=True)) >= {"maps", "times"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "cannot read"),
        ({"state_dict": {}}, "something else"),
        ({"lightning_gap_kind": "bag"}, "kind 'bag'"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "other"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        Trajectory.load(path)
    with pytest.raises(FileNotFoundError):
        Trajectory.load(tmp_path / "none")


def test_a_network_of_one_s_own_is_not_saved(tmp_path):
    with pytest.raises(MisconfigurationException, match="network of your own"):
        Trajectory([MongeMap(map=nn.Linear(2, 2))], [0, 1]).save(tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("maps", "times", "message"),
    [
        (2, [0, 1], "times has 2 times for 3 populations"),
        (2, [0, 2, 1], "times must increase"),
        (2, [0, 1, "later"], r"times\[2\] must be"),
        (0, [0], "maps is empty"),
    ],
)
def test_times_and_maps_fit_together(maps, times, message):
    with pytest.raises(ValueError, match=message):
        Trajectory([small(2) for _ in range(maps)], times)


def test_maps_are_of_one_space():
    with pytest.raises(ValueError, match="takes 3 features"):
        Trajectory([small(2), small(3)], [0, 1, 2])
    with pytest.raises(ValueError, match="other features"):
        Trajectory([small(2, feature_names=["a", "b"]), small(2, feature_names=["b", "a"])], [0, 1, 2])
    with pytest.raises(TypeError, match="must be a MongeMap"):
        Trajectory([nn.Linear(2, 2)], [0, 1])
    with pytest.raises(ValueError, match="no network"):
        Trajectory([MongeMap()], [0, 1])


# --- fits ---


def make():
    return MongeMap(map=ResidualMLP(2, (16,), start="mean"), optimizer=FAST)


def make_conditional():
    return MongeMap(map=ConditionalMap(2, (8,), num_conditions=2))


def test_a_fit_carries_each_population_to_the_next():
    torch.manual_seed(0)
    populations = [day.float() for day in DAYS]
    trajectory = fit_trajectory(populations, TIMES, make_model=make, max_steps=60, batch_size=100, standardize=True)
    for t, day in zip(TIMES, populations, strict=True):
        torch.testing.assert_close(trajectory.at(populations[0], t).mean(0), day.mean(0), rtol=0, atol=0.6)


def test_one_table_holds_all_times():
    anndata, pd = pytest.importorskip("anndata"), pytest.importorskip("pandas")
    values = torch.cat(DAYS).float().numpy()
    obs = pd.DataFrame({"day": np.repeat([1, 2, 5], 300), "type": ["B", "T"] * 450})
    obs.index = obs.index.astype(str)
    cells = anndata.AnnData(values, obs=obs)
    options = {"key": "day", "make_model": make_conditional, "max_steps": 2, "batch_size": 50, "conditions": "type"}
    trajectory = fit_trajectory(cells, TIMES, **options)
    assert trajectory.at(cells[cells.obs["day"] == 1], 3, condition="B").shape == (300, 2)
    rows = held_out_times(cells, TIMES, most=50, **options)
    assert {row["time"] for row in rows} == {2}


def test_a_time_left_out_is_compared_with_floors():
    torch.manual_seed(0)
    # Two branches: between random pairs of them there is nothing.
    branch = torch.tensor([[3.0, 3.0], [3.0, -3.0]])[torch.arange(400) % 2]
    days = [normal(400, 2, seed=k) * 0.3 + k * branch + torch.tensor([0.0, 1.0]) * branch for k in range(3)]
    rows = held_out_times(
        days, [0, 1, 2], make_model=make, max_steps=150, batch_size=100, most=150,
    )  # fmt: skip
    for name in ("energy_distance", "wasserstein_1"):
        score = {row["candidate"]: row[name] for row in rows}
        assert score["floor"] < min(score["random"], score["before"], score["after"])
        assert score["map"] < min(score["random"], score["before"], score["after"])
        assert all(row[f"{name}_std"] > 0 for row in rows)
    assert {row["samples"] for row in rows} == {150}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": [0, 1]}, "times has 2 times for 3 populations"),
        ({"times": [0, 2, 1]}, "times must increase"),
        ({"components": 1}, "components= would be other ones"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"populations": [normal(9, 2), normal(9, 3), normal(9, 2)]}, "they must agree"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_the_first_fit(arguments, message):
    def make_model():
        raise AssertionError("a fit began")

    given = {"populations": DAYS, "times": TIMES, "make_model": make_model, **arguments}
    with pytest.raises(ValueError, match=message):
        fit_trajectory(**given)
    with pytest.raises(ValueError, match=message):
        held_out_times(**given)


def test_two_times_leave_none_out():
    with pytest.raises(ValueError, match="one before and one after"):
        held_out_times(DAYS[:2], [0, 1], batch_size=50)
