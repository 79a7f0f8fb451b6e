"""``lightning-gap plan``: what it prints is what training does; a configuration is planned without a trace."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from test_commands import _rows, _said
from torch.utils.data import DataLoader, TensorDataset

from lightning_gap import LargeBatchRegime
from lightning_gap.cli import main
from lightning_gap.regime import plan_regime
from lightning_gap.regime.scaling import default_train_longer

pytest.importorskip("jsonargparse")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader.*"),
    pytest.mark.filterwarnings("ignore:.*on_validation.*"),
]


class Model(LightningModule):
    """A line that would complain of being trained."""

    def __init__(self, lr: float = 0.02, step: int = 2, own_optimizer: bool = True) -> None:
        super().__init__()
        self.layer, self.lr, self.step, self.own_optimizer = torch.nn.Linear(4, 1), lr, step, own_optimizer

    def training_step(self, batch, batch_idx):
        raise AssertionError("a plan trains nothing")

    def validation_step(self, batch, batch_idx):
        raise AssertionError("a plan validates nothing")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, self.step)]


class Data(LightningDataModule):
    """Fifty samples."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(50, 4)), self.batch_size)

    val_dataloader = train_dataloader


REGIME = {"class_path": "LargeBatchRegime", "init_args": {"reference_batch_size": 4}}


def settings(**trainer):
    trainer = {"max_epochs": 6, "accelerator": "cpu", "devices": 1, "callbacks": [REGIME], **trainer}
    return {
        "model": {"class_path": "test_plan_command.Model", "init_args": {"lr": 0.02}},
        "data": {"class_path": "test_plan_command.Data", "init_args": {"batch_size": 16}},
        "trainer": trainer,
    }


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(sys.modules, "test_plan_command", sys.modules[__name__])
    return tmp_path


def planned(capsys, place, config, *words):
    (place / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    out = _said(capsys, "plan", "--config", "run.yaml", *words)
    assert [path.name for path in place.rglob("*")] == ["run.yaml"]
    return _rows(out), out


def of_training(batch_size=16, accumulate=1, epochs=6):
    """The rows that a fit prints, by one that stops at once."""

    class Quiet(Model):
        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).sum() * 0

        def validation_step(self, batch, batch_idx):
            pass

    regime = LargeBatchRegime(4)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=[regime], accumulate_grad_batches=accumulate,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Quiet(), datamodule=Data(batch_size))
    return {name: [there, here] for name, there, here in regime.plan.rows()}


def test_a_configuration_is_planned_as_training_plans_it(capsys, place):
    rows, _ = planned(capsys, place, settings(enable_checkpointing=False))
    for name, cells in of_training().items():
        assert rows[name] == cells
    assert [name for name in rows if name.startswith("learning rate, ")][1:] == [
        f"learning rate, {share} % of the way" for share in (0, 25, 50, 75, 100)
    ]


def test_later_words_win(capsys, place):
    rows, _ = planned(capsys, place, settings(), "--trainer.max_epochs", "8", "--data.init_args.batch_size=25")
    assert rows["batch (samples per update)"] == ["4", "25"]
    assert rows["epochs"][0] == "8"


@pytest.mark.parametrize("equals", [True, False])
def test_a_file_of_arguments_alone_is_that_of_the_classes_named(capsys, place, equals):
    config = settings()
    config["model"], config["data"] = {"lr": 0.04}, {"batch_size": 10}
    words = ["--model", "test_plan_command.Model", "--data", "test_plan_command.Data"]
    words = [f"{words[0]}={words[1]}", f"{words[2]}={words[3]}"] if equals else words
    rows, _ = planned(capsys, place, config, *words)
    assert rows["batch (samples per update)"] == ["4", "10"]
    assert rows["learning rate, group 0 (sqrt, x1.581)"][0] == "0.04"


@pytest.mark.parametrize(
    ("devices", "replicas"),
    [
        ({"accelerator": "gpu", "devices": 2, "strategy": "ddp", "precision": "16-mixed"}, 2),
        ({"accelerator": "gpu", "devices": [0, 3]}, 2),
        ({"accelerator": "cuda", "devices": "0,1"}, 2),
        ({"devices": 2, "num_nodes": 2, "sync_batchnorm": True}, 4),
        ({"devices": "auto"}, 1),
        (
            {
                "accelerator": "gpu",
                "devices": 4,
                "strategy": {"class_path": "ModelParallelStrategy", "init_args": {"tensor_parallel_size": 2}},
            },
            2,
        ),
    ],
)
def test_devices_that_are_elsewhere_count(capsys, place, devices, replicas):
    config = settings(accumulate_grad_batches=2, **devices)
    config["data"]["init_args"]["batch_size"] = 5
    rows, out = planned(capsys, place, config)
    assert rows["batch (samples per update)"] == ["4", str(5 * 2 * replicas)]
    assert rows["updates per epoch"][1] == of_training(5, 2 * replicas)["updates per epoch"][1]
    assert (f"{replicas} replicas are planned" in out) == (replicas > 1)


def test_loggers_checkpoints_and_finders_leave_no_trace(capsys, place):
    callbacks = [
        REGIME,
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "kept"}},
        "LearningRateFinder",
        "UltraSlowDiffusion",
    ]
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}
    rows, out = planned(capsys, place, settings(callbacks=callbacks, logger=logger, profiler="simple"))
    assert "LearningRateFinder is left out" in out
    assert "reference epoch" in rows["ModelCheckpoint"][1]


PAGE = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("line", re.findall(r"^lightning-gap (plan --config .*)$", PAGE, flags=re.MULTILINE))
def test_the_pages_plans_of_an_example(capsys, place, line):
    pytest.importorskip("sklearn")
    shutil.copytree(Path(__file__).parents[2] / "examples", place / "examples")
    before = set(place.rglob("*"))
    out = _said(capsys, *line.split())
    assert {path for path in set(place.rglob("*")) - before if "__pycache__" not in path.parts} == set()
    assert _rows(out)["batch (samples per update)"] == ["32", "1024" if "256" in line else "512"]


class WithData(Model):
    """A model with loaders of its own, and no data module."""

    def train_dataloader(self):
        return Data(10).train_dataloader()


@pytest.mark.parametrize("rest", [{}, {"data": None, "ckpt_path": "lost.ckpt"}])
def test_a_module_with_data_of_its_own_is_planned(capsys, place, rest):
    config = {"model": {"class_path": "test_plan_command.WithData"}, "trainer": settings()["trainer"], **rest}
    rows, _ = planned(capsys, place, config)
    assert rows["batch (samples per update)"] == ["4", "10"]
    rows, _ = planned(capsys, place, {**config, "model": {}}, "--model", "test_plan_command.WithData")
    assert rows["batch (samples per update)"] == ["4", "10"]


class Bare(Model):
    """A model that leaves its optimizer to the configuration."""

    configure_optimizers = LightningModule.configure_optimizers


def test_an_optimizer_of_the_configuration_is_planned(capsys, place):
    config = settings()
    config["model"] = {"class_path": "test_plan_command.Bare"}
    config["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    config["lr_scheduler"] = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}
    rows, _ = planned(capsys, place, config)
    assert rows["learning rate, group 0 (sqrt, x2)"] == ["0.5", "1"]
    assert "ExponentialLR" in rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"callbacks": []}, "the configuration has no LargeBatchRegime"),
        ({"accelerator": "gpu", "devices": "auto"}, "give their number"),
        ({"max_epochs": 6, "callbacks": [{"class_path": "LargeBatchRegime", "init_args": {}}]}, "reference_batch_size"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(capsys, place, monkeypatch, change, message):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (place / "run.yaml").write_text(yaml.safe_dump(settings(**change)), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["plan", "--config", "run.yaml"])
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-gap: error")]
    assert message in said


def test_arguments_without_a_class_say_how_to_name_it(capsys, place):
    config = settings()
    config["model"] = {"lr": 0.04}
    (place / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["plan", "--config", "run.yaml"])
    assert "--model package.module.Class" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ from options

OPTIONS = ["--batch-size", "16", "--reference-batch-size", "4", "--samples", "50", "--epochs", "6", "--lr", "0.02"]


@pytest.mark.parametrize("rule", ["sqrt", "linear", "adam", "none"])
@pytest.mark.parametrize("longer", [None, 0.0, 0.3, 1.0])
def test_the_table_is_the_plans(capsys, rule, longer):
    words = [] if longer is None else ["--train-longer", str(longer)]
    out = _said(capsys, "plan", *OPTIONS, "--rule", rule, *words)
    plan = plan_regime(
        reference_batch_size=4, batch_size=16, lr_rule=rule, samples=50, max_epochs=6, train_longer=longer
    )
    rows = _rows(out)
    for name in ("updates", "updates per epoch", "epochs", "smaller last batch", "samples, and so the cost"):
        assert rows[name] == next([there, here] for what, there, here in plan.rows() if what == name)
    assert ("leave out --train-longer" in out) == bool(longer and not default_train_longer(rule))


@pytest.mark.parametrize("schedule", ["constant", "milestones", "cosine"])
@pytest.mark.parametrize("longer", ["0", "0.3", "1"])
def test_the_curve_is_that_of_training(capsys, place, schedule, longer):
    words = ["--milestones", "2,4"] if schedule == "milestones" else []
    out = _said(capsys, "plan", *OPTIONS, "--scheduler", schedule, *words, "--train-longer", longer)
    config = settings(enable_checkpointing=False)
    config["trainer"]["callbacks"] = [
        {"class_path": "LargeBatchRegime", "init_args": {"reference_batch_size": 4, "train_longer": float(longer)}}
    ]
    config["model"] = {"class_path": "test_plan_command.Scheduled", "init_args": {"schedule": schedule}}
    rows, _ = planned(capsys, place, config)
    found = {name: cells for name, cells in _rows(out).items() if name.startswith("learning rate, ")}
    assert len(found) == 6
    assert found == {name: rows[name] for name in found}


class Scheduled(Model):
    """A model with the schedules that the command knows."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02)
        schedulers = torch.optim.lr_scheduler
        if self.schedule == "milestones":
            return [optimizer], [schedulers.MultiStepLR(optimizer, [2, 4])]
        if self.schedule == "cosine":
            cosine = schedulers.CosineAnnealingLR(optimizer, 6 * 13)
            return [optimizer], [{"scheduler": cosine, "interval": "step"}]
        return optimizer


def test_validation_and_patience_are_told_in_updates(capsys):
    rows = _rows(_said(capsys, "plan", *OPTIONS, "--validate-every", "2", "--patience", "3"))
    assert rows["validation"] == ["every 2 epochs: 26 updates", "every 26 updates, when an epoch of 4 ends"]
    assert rows["patience"] == ["3 validations: 78 updates", "3 validations: 78 updates"]
    rows = _rows(_said(capsys, "plan", *OPTIONS, "--patience", "3", "--train-longer", "0"))
    assert rows["validation"] == ["every 1 epoch: 13 updates", "every 4 updates"]
    assert rows["patience"] == ["3 validations: 39 updates", "3 validations: 12 updates"]


@pytest.mark.parametrize(("rule", "updates"), [("linear", "250"), ("sqrt", "1000")])
def test_without_samples_a_rule_keeps_its_own_length(capsys, rule, updates):
    words = ["--batch-size", "8", "--reference-batch-size", "2", "--updates", "1000", "--rule", rule]
    assert _rows(_said(capsys, "plan", *words))["updates"] == ["1000", updates]
