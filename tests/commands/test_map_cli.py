"""``lightning-gap fit``, ``validate``, ``test`` and ``predict``: what configurations make, and what runs leave."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("jsonargparse")

from lightning.pytorch import Callback

from lightning_gap import LargeBatchRegime, MongeMap, SamplesDataModule
from lightning_gap.cli import main
from lightning_gap.commands.map_cli import MapCLI, trainer_parsers
from lightning_gap.monge import MLP, Anneal, BrenierMap, ConditionalMap, StructuredMap

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*val_check_interval.*"),
    pytest.mark.filterwarnings("ignore:.*dirpath has changed.*"),
]

QUIET = [
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
]  # fmt: skip
DATA = ["--data.source=a.npy", "--data.target=b.npy", "--data.batch_size=16"]
CSV = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=run"]


class Doubled(MongeMap):
    """A map of the user's own class.

    Args:
        factor: What the gap is multiplied by.
        **options: As of :class:`MongeMap`.
    """

    def __init__(self, factor: float = 2.0, **options):
        super().__init__(**options)
        self.factor = factor


class Shifted(SamplesDataModule):
    """Data of the user's own class.

    Args:
        shift: Added to the target.
    """

    def __init__(self, shift: float, batch_size: int = 16):
        source = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        super().__init__(source, source + shift, batch_size=batch_size)
        self.shift = shift


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.normal(size=(64, 2)).astype("f4"))
    np.save(tmp_path / "b.npy", rng.normal(size=(64, 2)).astype("f4") + 2)
    monkeypatch.chdir(tmp_path)


def fit(*words, data=DATA, steps=2):
    return MapCLI(["fit", *data, *QUIET, f"--trainer.max_steps={steps}", "--trainer.logger=false", *words])


def config(text):
    Path("c.yaml").write_text(text, encoding="utf-8")
    return "--config=c.yaml"


def checkpoint():
    (path,) = Path("logs/run").rglob("*.ckpt")
    return path


def test_the_default_map_has_the_dimension_of_the_data():
    cli = fit()
    assert cli.trainer.global_step == 2
    assert type(cli.model.map) is BrenierMap
    assert cli.model.map.dim == 2
    assert type(cli.datamodule) is SamplesDataModule


def test_a_configuration_makes_networks_schedules_and_optimizers():
    cli = fit(config("""
        model:
          cost: {class_path: lightning_gap.monge.costs.PNorm, init_args: {p: 1.5}}
          map: {class_path: StructuredMap, init_args: {dim: 2, cost: pnorm(p=1.5), hidden: [8]}}
          gap_weight: {class_path: lightning_gap.monge.Anneal, init_args: {start: 1, end: 2, updates: 5, shape: linear}}
          optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.5, betas: [0.5, 0.9]}}
          lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1, gamma: 0.5}}
          gap_reference: a.npy
        """))  # fmt: skip
    model = cli.model
    assert type(model.map) is StructuredMap
    assert str(model.cost) == "pnorm(p=1.5)"
    assert model.gap_weight == Anneal(1.0, 2.0, 5, "linear")
    assert model.objective.gap_on == "reference"
    assert torch.equal(model.gap_reference, torch.from_numpy(np.load("a.npy")))
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / 4)


def test_the_checkpoint_makes_it_all_again():
    fit(config("""
        model:
          map: {class_path: MLP, init_args: {dim: 2, hidden: [8]}}
          epsilon_factor: {class_path: lightning_gap.monge.Anneal, init_args: {start: 4, end: 1, updates: 5}}
          optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.25}}
          lr_scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR, init_args: {T_max: 7}}
        """), *CSV)  # fmt: skip
    model = MongeMap.load_from_checkpoint(checkpoint())
    assert type(model.map) is MLP
    assert model.epsilon_factor == Anneal(4.0, 1.0, 5)
    made = model.configure_optimizers()
    assert type(made["optimizer"]) is torch.optim.SGD
    assert made["optimizer"].param_groups[0]["lr"] == 0.25
    assert made["lr_scheduler"]["scheduler"].T_max == 7


def test_the_callbacks_are_known_by_their_names():
    names = ["GhostBatchNorm", "GradientNoiseScale", "LargeBatchRegime", "MapFigure", "UltraSlowDiffusion"]
    parser = trainer_parsers()["fit"]
    for name in names:
        said = io.StringIO()
        with redirect_stdout(said), pytest.raises(SystemExit) as ended:
            parser.parse_args([f"--trainer.callbacks.help={name}"])
        assert not ended.value.code
        listed = said.getvalue()
        assert f"lightning_gap.{name}" in listed
        # Each option has its text, from the docstring.
        options = re.findall(r"^  --\S*init_args\.(\w+) [A-Z{\[].*\n(.*)", listed, flags=re.MULTILINE)
        assert all(re.search(r"\w", text) for _, text in options)


def test_a_callback_gets_its_arguments():
    cli = fit(
        "--trainer.callbacks+=LargeBatchRegime", "--trainer.callbacks.reference_batch_size=8",
        "--trainer.callbacks.batch_size=16", "--model.optimizer=SGD", "--model.optimizer.lr=0.5",
    )  # fmt: skip
    (regime,) = [c for c in cli.trainer.callbacks if isinstance(c, LargeBatchRegime)]
    assert regime.plan.ratio == 2
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * 2**0.5)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_explains_every_argument_of_model_and_data(command):
    text = trainer_parsers()[command].format_help()
    for part in ("model", "data"):
        for found in re.finditer(rf"^  --{part}\.(\w+)[ ,\n].*\n?(?:   .*\n)*", text, flags=re.MULTILINE):
            assert not re.fullmatch(r"\s*\(type.*", found[0].split(found[1], 1)[1], flags=re.DOTALL), found[0]
    assert "Ground cost" in text
    assert "Share of the rows that is held out for validation" in re.sub(r"\s+", " ", text)


def test_print_config_is_a_configuration(capsys):
    words = ["fit", *DATA, *QUIET, "--trainer.max_steps=2", "--trainer.logger=false", "--model.cost=euclidean",
             "--model.map=MLP", "--model.map.dim=2", "--trainer.callbacks+=UltraSlowDiffusion",
             "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.25"]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    Path("printed.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        main(["fit", "--config=printed.yaml", "--print_config"])
    assert capsys.readouterr().out == printed
    first, second = MapCLI(words), MapCLI(["fit", "--config=printed.yaml"])
    assert dict(first.model.hparams) == dict(second.model.hparams)
    assert first.model.hparams["optimizer"]["init_args"]["lr"] == 0.25
    for mine, theirs in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_saved_configuration_runs_again_in_the_same_folder():
    cli = fit(*CSV)
    (saved,) = Path("logs/run").rglob("config.yaml")
    again = MapCLI(["fit", f"--config={saved}"])
    assert again.trainer.log_dir != cli.trainer.log_dir
    for mine, theirs in zip(cli.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_no_configuration_of_the_user_s_is_overwritten():
    Path("config.yaml").write_text("model: {cost: euclidean}\n")
    for _ in range(2):
        fit("--config=config.yaml")
    assert Path("config.yaml").read_text() == "model: {cost: euclidean}\n"
    assert {path.name for path in Path().glob("config*")} == {"config.yaml", "config-v1.yaml", "config-v2.yaml"}


def test_a_run_without_length_has_one_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr("lightning_gap.commands.map_cli.DEFAULT_UPDATES", 3)
    cli = MapCLI(["fit", *DATA, *QUIET, "--trainer.logger=false"])
    assert cli.trainer.global_step == 3
    assert "training for 3 updates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "validations"),
    [
        (["--trainer.max_steps=6", "--trainer.limit_val_batches=1"], [1, 2, 3, 4, 5, 6]),
        (["--trainer.max_steps=44"], list(range(4, 45, 4))),
        (["--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.check_val_every_n_epoch=null"], [3, 6]),
        (["--trainer.max_epochs=2"], [3, 6]),
    ],
)
def test_validations_are_spread_over_the_updates(words, validations, monkeypatch):
    seen = []

    class See(Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(trainer.global_step)

    class Seeing(MapCLI):
        def instantiate_trainer(self, **options):
            trainer = super().instantiate_trainer(**options)
            trainer.callbacks.append(See())
            return trainer

    Seeing(["fit", *DATA, *QUIET, "--trainer.logger=false", *words])
    assert seen == validations


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("how", ["--trainer.limit_val_batches=0", "--data.val_fraction=0"])
def test_a_run_without_validation_leaves_its_map(how, capsys):
    found = fit(*CSV, how, steps=20)
    assert f"checkpoint: {checkpoint()}" in capsys.readouterr().out.replace(f"{Path.cwd()}/", "")
    weights = torch.load(checkpoint(), weights_only=True)["state_dict"]
    assert all(torch.equal(weights[name], value) for name, value in found.model.state_dict().items())


def test_a_run_that_is_to_leave_no_checkpoint_leaves_none(capsys):
    fit(*CSV, "--trainer.limit_val_batches=0", "--trainer.callbacks=ModelCheckpoint",
        "--trainer.callbacks.save_top_k=0")  # fmt: skip
    assert "checkpoint" not in capsys.readouterr().out
    assert not list(Path().rglob("*.ckpt"))


def test_evaluation_takes_the_model_of_the_checkpoint(capsys):
    cli = fit("--model.cost=euclidean", "--model.hidden=[8]", "--data.test_fraction=0.2", *CSV)
    path = str(checkpoint())
    for command in ("validate", "test"):
        again = MapCLI([command, *DATA, *QUIET, "--trainer.logger=false", f"--ckpt_path={path}",
                        "--data.test_fraction=0.2"])  # fmt: skip
        assert str(again.model.cost) == "euclidean"
        for mine, theirs in zip(cli.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert any("sinkhorn_divergence" in key for key in again.trainer.callback_metrics)


def test_a_described_model_gets_the_checkpoint_s_weights():
    cli = fit("--model.hidden=[8]", *CSV)
    again = MapCLI(["validate", *DATA, *QUIET, "--trainer.logger=false", f"--ckpt_path={checkpoint()}",
                    "--model.hidden=[8]"])  # fmt: skip
    assert torch.equal(next(cli.model.map.parameters()), next(again.model.map.parameters()))


def test_weights_of_another_network_are_refused_in_one_line(capsys):
    fit("--model.hidden=[8]", *CSV)
    words = ["validate", *DATA, *QUIET, "--trainer.logger=false", f"--ckpt_path={checkpoint()}", "--model.hidden=[9]"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(words)
    assert "weights of another network than the one that is described" in capsys.readouterr().err


def test_a_fault_of_a_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(Doubled, "training_step", lambda self, batch, batch_idx: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["fit", *DATA, *QUIET, "--trainer.max_steps=1", "--trainer.logger=false", "--model=test_map_cli.Doubled"])


def test_a_run_goes_on_from_its_checkpoint():
    whole = fit(steps=4)
    fit(*CSV)
    rest = MapCLI(["fit", *DATA, *QUIET, "--trainer.max_steps=4", "--trainer.logger=false",
                   f"--ckpt_path={checkpoint()}"])  # fmt: skip
    assert rest.trainer.global_step == 4
    for mine, theirs in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_predictions_are_written_and_none_is_overwritten(capsys):
    cli = fit(*CSV)
    for name in ("predictions.npy", "predictions-v1.npy"):
        MapCLI(["predict", *DATA, *QUIET, "--trainer.logger=false", f"--ckpt_path={checkpoint()}"])
        images = np.load(name)
        assert np.allclose(images, cli.model.transport(np.load("a.npy")).numpy(), atol=1e-6)
        assert name in capsys.readouterr().out


def test_classes_of_the_user_s_own():
    cli = fit(config("""
        model: {class_path: test_map_cli.Doubled, init_args: {factor: 3.0, dim: 2}}
        data: {class_path: test_map_cli.Shifted, init_args: {shift: 1.0}}
        """), data=[])  # fmt: skip
    assert cli.model.factor == 3.0
    assert cli.datamodule.shift == 1.0
    assert cli.trainer.global_step == 2


def test_a_class_of_the_user_s_own_by_words():
    cli = fit("--model=test_map_cli.Doubled", "--model.factor=4", "--model.hidden=[4]")
    assert cli.model.factor == 4.0
    assert cli.model.map.hparams["hidden"] == [4]


def test_conditions_of_a_table_make_a_conditional_map():
    pandas = pytest.importorskip("pandas")
    rows = pandas.DataFrame(np.random.default_rng(0).normal(size=(80, 2)), columns=["u", "v"])
    rows["arm"], rows["drug"] = ["control", "treated"] * 40, ["a", "a", "b", "b"] * 20
    rows.to_csv("t.csv", index=False)
    cli = fit("--data.source=t.csv", "--data.target=t.csv", "--data.source_rows={arm: control}",
              "--data.target_rows={arm: treated}", "--data.conditions=drug", "--data.columns=[u, v]",
              "--data.batch_size=8", data=[])  # fmt: skip
    assert type(cli.model.map) is ConditionalMap
    assert cli.model.condition_names == ["a", "b"]


def test_the_saved_configuration_names_files_as_they_were_given():
    fit("--data.val={source: a.npy, target: b.npy}", *CSV)
    (saved,) = Path("logs/run").rglob("config.yaml")
    data = yaml.safe_load(saved.read_text())["data"]
    assert data["source"] == "a.npy"
    assert data["val"] == {"source": "a.npy", "target": "b.npy"}
