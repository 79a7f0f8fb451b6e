"""A map without its training: the folder holds all of it, nothing else, and nothing that could run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from map_kinds import KINDS, model_of, started
from monge_runs import gaussians, samples, small, trainer
from torch import nn

import lightning_gap
from lightning_gap import MongeMap
from lightning_gap.cli import main
from lightning_gap.monge import (
    AffineRepresentation,
    BrenierMap,
    ConditionalMap,
    ConditionEncoding,
    ResidualMLP,
    maps,
)
from lightning_gap.monge.maps import TransportMap

safetensors = pytest.importorskip("safetensors.torch")

DTYPES = (torch.float32, torch.float64)
FILES = ["README.md", "config.json", "model.safetensors"]


class Own(nn.Module):
    """A network of a user's own, with a tied weight and a buffer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(2, width), nn.Linear(width, 2)
        self.again = self.inside
        self.register_buffer("shift", torch.tensor([1.0, 2.0]))

    def forward(self, x):
        return x + self.shift + self.outside(self.again(x).relu())


@pytest.fixture
def folder(tmp_path):
    started_map = started("residual, gaussian")
    MongeMap(map=started_map.net).save_pretrained(tmp_path / "map")
    return tmp_path / "map"


def change(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change_state) -> None:
    state = safetensors.load_file(folder / "model.safetensors")
    change_state(state)
    safetensors.save_file(state, folder / "model.safetensors")


# --- round trips ---


def test_every_public_map_is_among_them():
    public = {value for name in maps.__all__ if isinstance(value := getattr(maps, name), type)}
    assert {type(make()) for make in KINDS.values()} == {c for c in public if issubclass(c, TransportMap)} - {
        TransportMap
    }


@pytest.mark.filterwarnings("ignore:EntropicMap has no plan yet")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_map_comes_back_with_the_same_bits(kind, dtype, tmp_path):
    model, arguments = model_of(kind, dtype)
    images = model.transport(**arguments)
    model.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    loaded = MongeMap.from_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sorted(os.listdir(tmp_path)) == FILES
    assert type(loaded.map) is type(model.map)
    assert not loaded.training
    assert loaded.map.hparams == model.map.hparams
    again = loaded.transport(**arguments)
    assert again.dtype == images.dtype == dtype
    assert torch.equal(again, images)
    assert str(loaded.cost) == str(model.cost)
    assert torch.equal(images, arguments["x"]) == (kind == "entropic, not started")


@pytest.mark.parametrize("components", [None, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw_features_and_named_conditions_come_back(dtype, components, tmp_path):
    x = gaussians(50, 3)[0] * 10 + 5
    encodes = AffineRepresentation.fit(x.double(), standardize=True, components=components).to(dtype)
    encoding = ConditionEncoding.fit(
        ["drug", "dose"], ["embedding", "number"], [("A", "0"), ("B", "2")],
        embeddings={"drug": {"A": [0.5, -1.0], "B": [2.0, 0.1]}},
    )  # fmt: skip
    net = ConditionalMap(components or 3, (8,), condition_dim=encoding.dim)
    nn.init.normal_(net.displacement.last.weight)
    names = ["a", "b `|\n", "ç"]
    model = MongeMap(
        map=net.to(dtype), representation=encodes, condition_encoding=encoding, feature_names=names,
        condition_range=[[0.0, -1.0, -1.0], [2.0, 1.0, 1.0]], fitting_epsilon=0.3,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    loaded = MongeMap.from_pretrained(str(tmp_path))
    assert loaded.feature_names == names
    assert loaded.condition_range == model.condition_range
    assert loaded.condition_encoding.agrees_with(encoding)
    assert loaded.epsilons.fitting == model.epsilons.fitting
    condition = {"drug": "B", "dose": 2}
    assert torch.equal(loaded.transport(x, condition), model.transport(x, condition))
    assert torch.equal(loaded.interpolate(x, 0.3, condition), model.interpolate(x, 0.3, condition))
    with pytest.raises(ValueError, match="drug 'C'"):
        loaded.transport(x, {"drug": "C", "dose": 2})


def test_a_trained_map_comes_back_with_what_is_known_of_it(tmp_path):
    data = samples(400, batch_size=64, test_fraction=0.2, standardize=True)
    model, run = small(cost="euclidean", gap_weight=0.5), trainer(max_steps=3)
    run.fit(model, data)
    (tested,) = run.test(model, data, verbose=False)
    model.save_pretrained(tmp_path / "map")
    config, card = (Path(tmp_path / "map" / name).read_text() for name in ("config.json", "README.md"))
    config = json.loads(config)
    assert config["samples"] == [240, 240]
    assert config["updates"] == 3
    for name, value in tested.items():
        short = name.removeprefix("lightning_gap/monge/")
        assert short == "updates" or config["scores"][short] == pytest.approx(value)
    assert "240 training samples of the source" in card
    assert "## Held-out scores of a test" in card
    assert f"Paid in vain ≤ {config['scores']['test_suboptimality_upper']:.3g} %" in card
    assert "`euclidean`" in card
    loaded = MongeMap.from_pretrained(tmp_path / "map")
    assert loaded.epsilons.started
    assert (loaded.epsilons.fitting, loaded.epsilons.gap) == (model.epsilons.fitting, model.epsilons.gap)
    assert torch.equal(loaded.transport(data.source), model.transport(data.source))
    (again,) = trainer().test(loaded, data, verbose=False)
    assert {**again, "lightning_gap/monge/updates": 3.0} == tested
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("map", "again")]
    assert weights[0] == weights[1]


def test_a_checkpoint_keeps_what_is_known_and_a_new_fit_forgets_the_scores(tmp_path):
    data, model, run = samples(), small(), trainer(max_steps=2)
    run.fit(model, data)
    run.validate(model, data, verbose=False)
    run.save_checkpoint(tmp_path / "map.ckpt")
    loaded = MongeMap.load_from_checkpoint(tmp_path / "map.ckpt")
    assert loaded.record.state() == model.record.state()
    assert loaded.record.samples == [96, 96]
    assert set(loaded.record.scores) >= {"val_loss", "val_energy_distance"}
    model.record.note("test", {"loss": 1.0})
    trainer(max_steps=1, num_sanity_val_steps=0, limit_val_batches=0).fit(model, samples(val_fraction=0.0))
    assert model.record.scores == {}
    assert model.record.samples == [120, 120]


@pytest.mark.parametrize("held", [None, 3, {"samples": "ab", "updates": "x", "scores": []}, {"samples": [1, "x"]}])
def test_what_a_checkpoint_holds_is_numbers(held):
    model = small()
    model.record.load(held)
    assert model.record.state() == {"samples": None, "updates": 0, "scores": {}}


def test_another_process_needs_nothing_else(folder, tmp_path):
    x = gaussians(9)[0]
    torch.save([x, MongeMap.from_pretrained(folder).transport(x)], tmp_path / "images.pt")
    code = (
        "import torch; from lightning_gap import MongeMap; x, images = torch.load('images.pt')\n"
        "assert torch.equal(MongeMap.from_pretrained('map').transport(x), images)"
    )
    there = {**os.environ, "PYTHONPATH": str(Path(lightning_gap.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=there)


def test_the_command_that_maps_files_takes_a_folder(folder, tmp_path, capsys):
    x = gaussians(9)[0]
    np.save(tmp_path / "in.npy", x.numpy())
    words = ["transport", str(folder), str(tmp_path / "in.npy"), str(tmp_path / "out.npy"), "--device", "cpu"]
    main(words)
    images = torch.from_numpy(np.load(tmp_path / "out.npy"))
    assert torch.equal(images, MongeMap.from_pretrained(folder).transport(x))
    change(folder, format=2)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*words, "--overwrite"])
    assert "is of format 2" in capsys.readouterr().err


# --- a network, a cost of one's own ---


def test_a_network_of_ones_own_is_asked_for_by_its_name(tmp_path):
    net = Own()
    model = MongeMap(map=net.double())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["map"] == {"name": f"{__name__}.Own"}
    with pytest.raises(ValueError, match=rf"{__name__}\.Own.*no map of this package.*map=Own\(\.\.\.\)"):
        MongeMap.from_pretrained(tmp_path)
    x = gaussians(9)[0]
    loaded = MongeMap.from_pretrained(tmp_path, map=Own())
    assert torch.equal(loaded.transport(x), model.transport(x))
    assert loaded.map.again.weight is loaded.map.inside.weight
    with pytest.raises(ValueError, match=r"map\.inside\.weight"):
        MongeMap.from_pretrained(tmp_path, map=Own(width=5))
    with pytest.raises(ValueError, match="lacks"):
        MongeMap.from_pretrained(tmp_path, map=BrenierMap(2, (8,)))
    assert "map=your_network" in (tmp_path / "README.md").read_text()


def test_an_activation_of_ones_own_is_asked_for(tmp_path):
    model = MongeMap(map=ResidualMLP(2, (8,), nn.Softsign))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ResidualMLP, made with an activation or a cost of your own.*map="):
        MongeMap.from_pretrained(tmp_path)
    loaded = MongeMap.from_pretrained(tmp_path, map=ResidualMLP(2, (8,), nn.Softsign))
    x = gaussians(9)[0]
    assert torch.equal(loaded.transport(x), model.transport(x))


def test_a_cost_of_ones_own_is_asked_for(tmp_path):
    def quartic(x, y):
        return (x - y).pow(4).sum(-1)

    MongeMap(2, cost=quartic).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"name of a cost of your own.*quartic.*from_pretrained\(folder, cost=\.\.\.\)"
    ):
        MongeMap.from_pretrained(tmp_path)
    assert "quartic" in str(MongeMap.from_pretrained(tmp_path, cost=quartic).cost)
    assert "cost=your_cost" in (tmp_path / "README.md").read_text()


# --- what is not written ---


def test_neither_training_samples_nor_the_optimizer_are_in_the_folder(tmp_path):
    reference = torch.full((7, 2), 12345.0)
    model = small(gap_reference=reference)
    model.save_pretrained(tmp_path)
    state = safetensors.load_file(tmp_path / "model.safetensors")
    assert set(state) == {f"map.{name}" for name in model.map.state_dict()}
    assert not {"optimizer", "gap_reference"} & set(json.loads((tmp_path / "config.json").read_text())["arguments"])


def test_what_cannot_be_written_is_refused_before_there_is_a_folder(tmp_path):
    class Keeps(Own):
        def get_extra_state(self):
            return {"python": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match="no network yet"):
        MongeMap().save_pretrained(tmp_path / "map")
    with pytest.raises(TypeError, match="_extra_state"):
        MongeMap(map=Keeps()).save_pretrained(tmp_path / "map")
    with pytest.raises(TypeError, match=r"trainer\.test\(model, data\)\[0\]"):
        small().save_pretrained(tmp_path / "map", scores=[{"a": 1.0}])
    assert not (tmp_path / "map").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        small().save_pretrained(tmp_path / "file")


def test_shards_are_refused(tmp_path, monkeypatch):
    model = small()
    run = trainer(max_steps=1)
    run.fit(model, samples())
    monkeypatch.setattr("lightning_gap.monge.pretrained_folder.holds_whole_weights", lambda trainer: False)
    with pytest.raises(MisconfigurationException, match=r"SingleDeviceStrategy shards.*save_checkpoint"):
        model.save_pretrained(tmp_path / "map")


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch, folder):
    for name in [name for name in sys.modules if name.partition(".")[0] == "safetensors"]:
        monkeypatch.setitem(sys.modules, name, None)
    for who, call in (
        ("save_pretrained", lambda: small().save_pretrained(tmp_path / "new")),
        ("from_pretrained", lambda: MongeMap.from_pretrained(folder)),
    ):
        with pytest.raises(ModuleNotFoundError) as raised:
            call()
        assert str(raised.value) == f"{who} needs safetensors: pip install 'lightning_gap[hub]'"
    assert not (tmp_path / "new").exists()


# --- what is refused ---


@pytest.mark.parametrize("number", [0, 2, "1", True, None, 1.0, [1]])
def test_another_format_is_refused(folder, number):
    change(folder, format=number)
    with pytest.raises(ValueError, match=r"format .* reads 1: install the version that wrote it, '0\.1\.0'"):
        MongeMap.from_pretrained(folder)


PATHS = [
    "os.system", "torch.nn.Linear", "torch.optim.SGD", "lightning_gap.monge.MongeMap", "ResidualMLP", "", None, 3,
    "lightning_gap.monge.TransportMap", "lightning_gap.monge.SamplesDataModule", ["lightning_gap.monge.ResidualMLP"],
    "lightning_gap.monge.maps.residual.ResidualMLP",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_classes_that_are_no_map_of_this_package_are_refused_by_name(folder, path):
    imported = set(sys.modules)
    change(folder, map={"class_path": path, "init_args": {"dim": 2}})
    with pytest.raises(ValueError, match=re.escape(str(path or None)) + r".*map="):
        MongeMap.from_pretrained(folder)
    change(folder, map={"class_path": "nothing_of_that_name.Map", "init_args": {}})
    with pytest.raises(ValueError, match=r"nothing_of_that_name\.Map.*map=Map\(\.\.\.\)"):
        MongeMap.from_pretrained(folder)
    assert set(sys.modules) == imported


def test_missing_files_are_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"snapshot_download\('owner/name'\)"):
        MongeMap.from_pretrained("owner/name")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(name)):
            MongeMap.from_pretrained(folder)


def test_weights_that_are_not_the_maps_are_refused(folder):
    for edit, message in (
        (lambda state: state.pop("map.matrix"), r"lacks map\.matrix"),
        (lambda state: state.update(more=torch.zeros(1)), "has not, more"),
        (lambda state: state.update({"map.offset": torch.zeros(3)}), r"map\.offset .* \(3,\)"),
        (lambda state: state.update({"map.offset": torch.zeros(2, dtype=torch.int64)}), r"map\.offset as torch\.int64"),
    ):
        before = (folder / "model.safetensors").read_bytes()
        change_weights(folder, edit)
        with pytest.raises(ValueError, match=message):
            MongeMap.from_pretrained(folder)
        (folder / "model.safetensors").write_bytes(before)
    MongeMap.from_pretrained(folder)


def test_defaults_of_older_checkpoints_do_not_stand_for_weights(tmp_path):
    MongeMap(map=BrenierMap(2, (8,))).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda state: state.pop("map.share"))
    with pytest.raises(ValueError, match=r"lacks map\.share"):
        MongeMap.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["points", "weights", "potential", "sizes", "epsilons", "ties", "shifts"])
def test_a_plan_whose_tensors_do_not_fit_is_refused(name, tmp_path):
    model_of("entropic, labels")[0].save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for edit in (lambda value: value[:-1], lambda value: value[None], lambda value: value[..., :0]):
        change_weights(tmp_path, lambda s, edit=edit: s.update({f"map.{name}": edit(s[f"map.{name}"]).contiguous()}))
        with pytest.raises(ValueError, match="state is of no plan"):
            MongeMap.from_pretrained(tmp_path)
        (tmp_path / "model.safetensors").write_bytes(before)


def test_a_truncated_file_is_damaged(folder):
    weights = (folder / "model.safetensors").read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(weights) // 2, len(weights) - 1):
        (folder / "model.safetensors").write_bytes(weights[:length])
        with pytest.raises(ValueError, match="damaged"):
            MongeMap.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(weights)
    text = (folder / "config.json").read_text()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        (folder / "config.json").write_text(text[:length])
        with pytest.raises(ValueError, match="damaged"):
            MongeMap.from_pretrained(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="damaged"):
        MongeMap.from_pretrained(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_loads(folder, place, byte):
    path = folder / "model.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:place] + bytes([byte]) + before[place + 1 :])
    try:
        MongeMap.from_pretrained(folder)
    except ValueError:
        pass
    finally:
        path.write_bytes(before)


ODD = [None, True, -1, 0, 1.5, "", "x", "/etc/passwd", [], [1], {}, {"a": 1}, {"name": "f"}, [[1.0], [2.0]],
       {"class_path": "os.system", "init_args": {"command": "touch pwned"}}]  # fmt: skip


@pytest.mark.parametrize("table", ["arguments", "map", "epsilons", ""])
def test_an_odd_configuration_is_refused_or_loads(folder, table, monkeypatch):
    monkeypatch.chdir(folder)
    config = json.loads((folder / "config.json").read_text())
    names = list(config[table] if table else config)
    for name in names:
        for odd in ODD:
            changed = json.loads(json.dumps(config))
            (changed[table] if table else changed)[name] = odd
            (folder / "config.json").write_text(json.dumps(changed))
            try:
                MongeMap.from_pretrained(folder)
            except ValueError as error:
                assert str(error)  # noqa: PT017
    (folder / "config.json").write_text(json.dumps(config | {"arguments": {**config["arguments"], "more": 1}}))
    with pytest.raises(ValueError, match=r"other arguments than those of format 1, \['more'\]"):
        MongeMap.from_pretrained(folder)
    assert sorted(os.listdir(folder)) == FILES
