"""Checkpoints of strangers: nothing that a file names is run, and the error says what to do."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from monge_runs import gaussians, samples, small, trainer

from lightning_gap import MongeMap, SamplesDataModule
from lightning_gap.cli import main
from lightning_gap.monge import ResidualMLP
from lightning_gap.monge.transport_files import load_map


class Payload:
    """What pickle would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", gaussians(40)[0].numpy())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    run, path = trainer(max_steps=1), tmp_path_factory.mktemp("saved") / "map.ckpt"
    run.fit(small(), samples(batch_size=32))
    run.save_checkpoint(path)
    return path.read_bytes()


@pytest.fixture
def checkpoint(saved):
    Path("map.ckpt").write_bytes(saved)
    return torch.load("map.ckpt", weights_only=True)


def refused(message: str, capsys=None) -> None:
    """Load ``map.ckpt`` in every way there is, by commands too if asked to, and see that nothing comes of it."""
    before = sorted(os.listdir())
    for load in (
        lambda: MongeMap.load_from_checkpoint("map.ckpt"),
        lambda: MongeMap.load_from_checkpoint(Path("map.ckpt"), weights_only=True, map_location="cpu"),
        lambda: MongeMap.load_from_checkpoint(io.BytesIO(Path("map.ckpt").read_bytes())),
        lambda: load_map("map.ckpt"),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    if capsys is None:
        return
    data = ["--data.source=a.npy", "--data.target=a.npy", "--data.batch_size=8", "--trainer.logger=false",
            "--trainer.accelerator=cpu", "--trainer.enable_checkpointing=false"]  # fmt: skip
    for words in (
        ["transport", "map.ckpt", "a.npy", "out.npy", "--device", "cpu"],
        *([command, *data, "--ckpt_path=map.ckpt"] for command in ("fit", "validate", "test", "predict")),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "callbacks", "anywhere"])
def test_a_pickle_is_not_run(checkpoint, place):
    checkpoint.setdefault(place, {})["payload"] = Payload(Path("pwned").absolute())
    torch.save(checkpoint, "map.ckpt")
    refused("holds more than tensors and plain Python")
    assert not Path("pwned").exists()


def test_a_bare_pickle_is_not_run():
    Path("map.ckpt").write_bytes(pickle.dumps(Payload(Path("pwned").absolute())))
    refused("the checkpoint .* (holds more than tensors|is damaged)|cannot read the checkpoint")
    assert not Path("pwned").exists()


def test_a_fit_that_goes_on_does_not_run_a_pickle_either(checkpoint):
    checkpoint["loops"]["payload"] = Payload(Path("pwned").absolute())
    torch.save(checkpoint, "map.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        trainer().fit(small(), SamplesDataModule("a.npy", "a.npy", batch_size=8), ckpt_path="map.ckpt")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "builtins.eval", "evil.make", 7, ["os.system"]])
def test_an_instantiator_is_not_called(checkpoint, name, monkeypatch):
    _importable("evil", monkeypatch)
    checkpoint["hyper_parameters"].update({"_instantiator": name, "_class_path": "evil.Make"})
    torch.save(checkpoint, "map.ckpt")
    refused("to make the model, which is not run: make it yourself")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_s_own_instantiator_is_passed_over(checkpoint, package, monkeypatch):
    """It would import whatever class the arguments name."""
    name = f"{package}.cli.instantiate_module"
    _importable("evil", monkeypatch)
    expected = MongeMap.load_from_checkpoint("map.ckpt").transport(np.load("a.npy"))
    checkpoint["hyper_parameters"].update({"_instantiator": name, "_class_path": "evil.Make"})
    torch.save(checkpoint, "map.ckpt")
    assert torch.equal(MongeMap.load_from_checkpoint("map.ckpt").transport(np.load("a.npy")), expected)
    checkpoint["hyper_parameters"]["map"] = {"class_path": "evil.Make"}
    torch.save(checkpoint, "map.ckpt")
    with pytest.raises(ValueError, match=r"map: 'evil.Make' is not of torch.optim or lightning_gap"):
        MongeMap.load_from_checkpoint("map.ckpt")
    assert not Path("pwned").exists()


def _importable(name: str, monkeypatch) -> None:
    Path(f"{name}.py").write_text("import pathlib\npathlib.Path('pwned').touch()\nclass Make: ...\nmake = print\n")
    monkeypatch.syspath_prepend(str(Path.cwd()))


WRITES = {"argument": "OUT", "location": "pwned.npy", "table": None, "overwrite": True}
STRANGE = [
    {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "pwned"]}},
    {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "pwned"]}, "partial": True},
    {"class_path": "os.system", "init_args": {"command": "touch pwned"}},
    {"class_path": "evil.Make"},
    {"class_path": "lightning_gap.evil.Make"},
    {"class_path": "lightning_gap.monge.checkpoint.import_module", "init_args": {"name": "evil"}},
    {"class_path": "torch.optim.lr_scheduler.types.FunctionType", "init_args": {}},
    # Of this package, and yet no part of a map: this one would make a file.
    {"class_path": "lightning_gap.monge.samples.files.write.Output", "init_args": WRITES},
    {"class_path": "lightning_gap.SamplesDataModule", "init_args": {"source": "a.npy", "target": "a.npy"}},
    {"class_path": "lightning_gap.monge.module.MongeMap", "init_args": {"dim": 2, "gap_reference": "a.npy"}},
    {"class_path": ["os", "system"]},
    {"class_path": None},
    # Within the arguments of what is allowed.
    {"class_path": "lightning_gap.monge.maps.residual.ResidualMLP",
     "init_args": {"dim": 2, "activation": {"class_path": "subprocess.Popen", "init_args": {"args": "touch pwned"}}}},
    {"class_path": "lightning_gap.monge.maps.residual.ResidualMLP",
     "init_args": {"dim": 2, "hidden": [{"_instantiator": "os.system"}]}},
    {"class_path": "torch.optim.adam.Adam", "init_args": {"lr": {"class_path": "evil.Make"}}, "partial": True},
    {"class_path": "lightning_gap.monge.maps.residual.ResidualMLP", "init_args": "touch pwned"},
]  # fmt: skip


@pytest.mark.parametrize("argument", ["map", "optimizer", "lr_scheduler", "fitting_loss", "gap_weight"])
@pytest.mark.parametrize("strange", STRANGE, ids=lambda value: str(value["class_path"])[-30:])
def test_classes_of_others_are_not_imported_or_made(checkpoint, argument, strange, monkeypatch):
    _importable("evil", monkeypatch)
    checkpoint["hyper_parameters"][argument] = strange
    torch.save(checkpoint, "map.ckpt")
    before = sorted(os.listdir())
    for load in (lambda: MongeMap.load_from_checkpoint("map.ckpt"), lambda: load_map("map.ckpt")):
        with pytest.raises(ValueError, match=rf"{argument}: "):
            load()
    assert sorted(os.listdir()) == before
    # What the user gives goes before what the file names.
    given = {"map": ResidualMLP(2, (16,)), "fitting_loss": "energy", "gap_weight": 0.5}.get(argument)
    if given is not None:
        assert MongeMap.load_from_checkpoint("map.ckpt", **{argument: given}).transport(np.load("a.npy")).shape == (
            40,
            2,
        )


def test_commands_run_no_pickle(checkpoint, capsys):
    checkpoint["callbacks"]["payload"] = Payload(Path("pwned").absolute())
    torch.save(checkpoint, "map.ckpt")
    refused("holds more than tensors and plain Python", capsys)
    assert not Path("pwned").exists()


def test_commands_make_no_class_of_others(checkpoint, capsys):
    checkpoint["hyper_parameters"]["map"] = STRANGE[0]
    torch.save(checkpoint, "map.ckpt")
    refused(r"map: 'subprocess.Popen' is not of .*load_from_checkpoint\(path, map=...\)", capsys)


def test_files_that_it_names_are_not_read(checkpoint):
    checkpoint["hyper_parameters"]["gap_reference"] = "a.npy"
    torch.save(checkpoint, "map.ckpt")
    refused("names 'a.npy' as gap_reference, which is not read")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x80\x02."])
def test_damaged_files(content):
    Path("map.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged or no checkpoint|holds more than"):
        MongeMap.load_from_checkpoint("map.ckpt")
    with zipfile.ZipFile("map.ckpt", "w") as archive:
        archive.writestr("x", "y")
    refused("damaged or no checkpoint")


def test_trust_is_given_by_name(checkpoint):
    checkpoint["anything"] = Payload(Path("pwned").absolute())
    torch.save(checkpoint, "map.ckpt")
    MongeMap.load_from_checkpoint("map.ckpt", weights_only=False)
    assert Path("pwned").exists()


def test_an_instance_loads_no_checkpoint(checkpoint):
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        MongeMap(2).load_from_checkpoint("map.ckpt")


@pytest.mark.filterwarnings("ignore::lightning_gap.monge.ConvergenceWarning", "ignore:at update .* the solver stopped")
def test_conditions_of_the_checkpoint_are_those_of_the_data():
    """Labels of other conditions have the shapes of the right ones."""

    def data(*names):
        labels = [*names] * 20
        return SamplesDataModule("a.npy", "a.npy", batch_size=16, conditions=(labels, labels))

    run = trainer(max_steps=1)
    run.fit(small(None), data("x", "y"))
    run.save_checkpoint("map.ckpt")
    trainer().validate(small(None), data("x", "y"), ckpt_path="map.ckpt", verbose=False)
    with pytest.raises(MisconfigurationException, match="labels of the data mean the conditions x, z"):
        trainer().validate(small(None), data("x", "z"), ckpt_path="map.ckpt", verbose=False)
