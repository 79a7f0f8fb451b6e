"""Wrong uses: each gives one clear line that names the argument and the remedy, and loses nothing.

A row is what is wrong, how it is done, and what the line says. To add one, add a row: the words of a command, where
``{}`` is a folder with the files of `_files`, or a function that raises.
"""

import builtins
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from logged_runs import csv_run, large_batch_run

from lightning_gap import (
    GhostBatchNorm,
    GradientNoiseScale,
    LargeBatchRegime,
    MapFigure,
    MongeMap,
    SamplesDataModule,
    UltraSlowDiffusion,
    convert_ghost_batchnorm,
    monge_gap,
    sinkhorn_divergence,
)
from lightning_gap.cli import main
from lightning_gap.diffusion import fit_diffusion
from lightning_gap.monge import ConditionalMap, ResidualMLP

PLAN = "plan --batch-size 64 --reference-batch-size 16 "
BOARD = "dashboard --entity e --project p "

COMMANDS = [
    ("no command", "", "required: COMMAND"),
    ("an unknown command", "dance", "invalid choice: 'dance'"),
    ("an abbreviated option", PLAN + "--samp 50", "unrecognized arguments: --samp"),
    ("no batch size", "plan --reference-batch-size 16", "required: --batch-size"),
    ("a batch of nothing", "plan --batch-size 0 --reference-batch-size 16", "--batch-size: 0 is too small"),
    ("a batch in words", "plan --batch-size many --reference-batch-size 16", "'many' is not a whole number"),
    ("an unknown rule", PLAN + "--rule cubic", "argument --rule: invalid choice: 'cubic'"),
    ("epochs of unknown length", PLAN + "--epochs 10", "--epochs needs --samples"),
    ("milestones not said", PLAN + "--scheduler milestones", "needs --milestones, as 30,60,80"),
    ("milestones out of order", PLAN + "--milestones 30,20", "'30,20' does not increase"),
    ("a milestone after the end", PLAN + "--samples 99 --lr 1 --epochs 10 --milestones 10", "not before the end"),
    ("milestones of a cosine", PLAN + "--scheduler cosine --milestones 3", "do not go with --scheduler cosine"),
    ("a schedule without a rate", PLAN + "--samples 99 --milestones 3", "needs --lr"),
    ("a rate that is no number", PLAN + "--lr nan", "'nan' is not a finite number"),
    ("a negative rate", PLAN + "--lr=-0.1", "-0.1 is too small: give a number greater than 0"),
    ("more than the reference run's updates", PLAN + "--train-longer 1.5", "give a number from 0 to 1"),
    ("a batch over the data", PLAN + "--samples 50 --epochs 2 --drop-last", "or leave out --drop-last"),
    ("a run that is not there", "report {}/nowhere", "nowhere does not exist: give the folder of a run"),
    ("a folder without runs", "report {}/empty", "empty holds no run: expected a metrics.csv"),
    ("another program's metrics.csv", "report {}/foreign", "has no column 'step'"),
    ("a checkpoint in place of a run", "report {}/last.ckpt", "last.ckpt is no file of a run"),
    ("a damaged offline run", "report {}/damaged", "is damaged at byte 7: copy it again"),
    ("a page over a folder", "report {}/run --output {}/empty", "is a folder: name a file"),
    ("a page under a file", "report {}/run --output {}/last.ckpt/r.html", "choose another file"),
    ("no run at all", "report", "required: RUN"),
    ("a dashboard of nobody", "dashboard --project p", "required: --entity"),
    ("a dashboard without a project", "dashboard --entity e --project=", "--project is empty: name one"),
    ("an unknown grouping", BOARD + "--group-by seed", "invalid choice: 'seed'"),
    ("a workspace under a file", BOARD + "--offline {}/last.ckpt/w.json", "cannot write --offline"),
    ("an unknown shell", "completion basic", "invalid choice: 'basic'"),
]  # fmt: skip

FIT = "fit --data.source {}/a.npy --data.target {}/b.npy "
MAP, DRUGS = "transport {}/map.ckpt ", "transport {}/drugs.ckpt "

MAPS = [
    ("a map of nothing", "fit", "arguments are required: fit.data.source, fit.data.target"),
    ("no such configuration", "fit --config nowhere.yaml", '"config": File does not exist'),
    ("YAML that is none", "fit --config {}/broken.yaml", "Problems parsing config"),
    ("a wrong key in YAML", "fit --config {}/cots.yaml", "does not accept option 'model.cots'"),
    ("a wrong key of a network", FIT + "--config {}/hiden.yaml", '"model.map": Option \'hiden\' is not accepted'),
    ("a wrong type", FIT + "--data.batch_size many", "data.batch_size\": Expected a <class 'int'>. Got value: many"),
    ("a word for a number", FIT + "--model.gap_weight high",
     "model.gap_weight\": Expected a <class 'float'>. Got value: high"),
    ("an abbreviation", FIT + "--trainer.max_step 3", "unrecognized arguments: --trainer.max_step"),
    ("samples that are not there", "fit --data.source {}/no.npy --data.target {}/b.npy", "source: there is no file"),
    ("a file of NaN", "fit --data.source {}/nan.npy --data.target {}/b.npy", "holds NaN or infinity in 1 of 40 rows"),
    ("another dimension", "fit --data.source {}/a.npy --data.target {}/three.npy", "dimension 2 but target"),
    ("a wrong column", "fit --data.source {}/t.csv --data.target {}/t.csv --data.columns [u,w]", "has no column 'w'"),
    ("a wrong column of conditions", "fit --data.source {}/t.csv --data.target {}/t.csv --data.columns [u,v] "
     "--data.conditions dose", "has no 'dose'"),
    ("rows that are not there", "fit --data.source {}/t.csv --data.target {}/t.csv --data.columns [u,v] "
     "--data.source_rows {drug: z}", "is never 'z'; there is 'a', 'b'"),
    ("a cost that is none", FIT + "--model.cost manhatan", "unknown cost 'manhatan': choose one of cosine"),
    ("a negative epsilon of a map", FIT + "--model.gap_epsilon=-1", "gap_epsilon must be a positive finite number"),
    ("a loss that is none", FIT + "--model.fitting_loss energi",
     "Expected a typing.Literal['sinkhorn', 'energy', 'semidual']. Got value: energi"),
    ("a batch over the samples", FIT + "--data.batch_size 1000", "use batch_size <= 36, or hold out less"),
    ("a network that is none", FIT + "--model.map Nope", '"model.map": Expected a dot import path string: Nope'),
    ("a network without its dimension", FIT + "--model.map MLP",
     '"model.map": the following arguments are required: dim'),
    ("an optimizer that is none", FIT + "--model.optimizer Adan",
     '"model.optimizer": Expected a dot import path string: Adan'),
    ("a callback that is none", FIT + "--trainer.callbacks+=Nope",
     '"trainer.callbacks": Expected a dot import path string: Nope'),
    ("a callback without its argument", FIT + "--trainer.callbacks+=LargeBatchRegime",
     '"trainer.callbacks": the following arguments are required: reference_batch_size'),
    ("a callback of nothing", FIT + "--trainer.callbacks+=LargeBatchRegime "
     "--trainer.callbacks.reference_batch_size=0", "error: reference_batch_size must be at least 1, got 0"),
    ("a model that is none", FIT + "--model torch.nn.Linear",
     '"model": Import path torch.nn.Linear does not correspond to a subclass of MongeMap'),
    ("a device that is not there", FIT + "--data.batch_size 8 --trainer.devices 0", "devices"),
    ("a damaged checkpoint", FIT + "--ckpt_path {}/last.ckpt", "is damaged or no checkpoint; copy it again"),
    ("no such checkpoint", "validate" + FIT[3:] + "--ckpt_path {}/no.ckpt", "there is no checkpoint"),
    ("a checkpoint of something else", "test" + FIT[3:] + "--ckpt_path {}/other.ckpt", "no checkpoint of a MongeMap"),
    ("a folder as a checkpoint", "test" + FIT[3:] + "--ckpt_path {}", "is a folder: name the .ckpt file in it"),
    ("no file to transport", MAP, "required: IN, OUT"),
    ("transport by a damaged checkpoint", "transport {}/last.ckpt {}/a.npy out.npy", "is damaged or no checkpoint"),
    ("transport of what is not there", MAP + "{}/no.npy out.npy", "IN: there is no file"),
    ("transport of another dimension", MAP + "{}/three.npy out.npy", "the map takes 2 features, and IN (three.npy)"),
    ("transport of NaN", MAP + "{}/nan.npy out.npy", "holds NaN or infinity in row 7"),
    ("transport of all numbers", MAP + "{}/t.csv out.npy", "has 3 (u, v, dose_mg): name the features by --columns"),
    ("transport of a wrong column", MAP + "{}/t.csv out.npy --columns u,w", "has no column 'w'"),
    ("transport of a vector", MAP + "{}/one.npy out.npy", "must have shape (n, d)"),
    ("transport over a file", MAP + "{}/a.npy {}/b.npy", "exists: choose another name, or give --overwrite"),
    ("transport to a folder", MAP + "{}/a.npy {}/folder.npy", "is a folder: name a file"),
    ("transport under a file", MAP + "{}/a.npy {}/b.npy/out.npy", "choose another folder"),
    ("transport to nowhere", MAP + "{}/a.npy nowhere/out.npy", "choose another folder"),
    ("transport to an unknown format", MAP + "{}/a.npy out.txt", "must end in one of .npy"),
    ("AnnData out of an array", MAP + "{}/a.npy out.h5ad", "write an .npy, .csv or .parquet file"),
    ("a condition without conditions", MAP + "{}/a.npy out.npy --condition x", "this map has no conditions"),
    ("conditions without a condition", DRUGS + "{}/a.npy out.npy", "give --condition, one of 'a', 'b'"),
    ("an unknown condition", DRUGS + "{}/a.npy out.npy --condition z", "its conditions are 'a', 'b'"),
    ("a column of unknown conditions", DRUGS + "{}/t.csv out.npy --columns u,v --condition cell", "no condition 'c0'"),
    ("no rows at a time", MAP + "{}/a.npy out.npy --batch-size 0", "--batch-size: 0 is too small"),
    ("one file by many", MAP + "{}/a.npy out.npy --devices 2", "one file is mapped by one process, and there are 2"),
    ("a folder to a file", MAP + "{}/empty {}/a.npy", "is a file, and IN is a folder: name a folder"),
    ("a folder without files", MAP + "{}/empty out", "has no file whose name ends in one of .npy"),
    ("a folder over another", MAP + "{}/empty out --overwrite", "--overwrite is for one file: delete the folder OUT"),
    ("no patience at all", MAP + "{}/empty out --stale-after 0", "0 is too small"),
    ("a device of transport", MAP + "{}/a.npy out.npy --device abacus", "there is no such device here"),
]  # fmt: skip

MISSING = [
    ("jsonargparse", "fit --data.source {}/a.npy", "pip install 'lightning_gap[cli]'"),
    ("matplotlib", "report {}/run", "pip install 'lightning_gap[plots]'"),
    ("wandb", "report {}/damaged", "pip install 'lightning_gap[wandb]'"),
    ("wandb_workspaces", BOARD + "--offline {}/w.json", "pip install 'lightning_gap[wandb]'"),
    ("shtab", "completion bash", "pip install 'lightning_gap[cli]'"),
]


def _x(*shape):
    return torch.ones(shape)


def _fit(callback):
    return lambda folder: large_batch_run(folder, False, callbacks=[callback], enable_checkpointing=False)


CODE = [
    ("a reference batch of nothing", lambda _: LargeBatchRegime(0), "reference_batch_size must be at least 1, got 0"),
    ("an unknown rule", lambda _: LargeBatchRegime(8, lr_rule="cubic"), "pass one of"),
    ("a clipping norm of nothing", lambda _: LargeBatchRegime(8, clip_norm=0), "clip_norm=0 must be positive"),
    ("noise beside a larger rate", lambda _: LargeBatchRegime(8, gradient_noise=True), 'pass lr_rule="none"'),
    ("ghosts of one half", lambda _: GhostBatchNorm(0.5), "ghost_batch_size must be an int"),
    ("ghosts of nothing", lambda _: convert_ghost_batchnorm(torch.nn.Linear(2, 2), 0), "at least 1, got 0"),
    ("measured never", lambda _: GradientNoiseScale(every_n_updates=0), "every_n_updates must be at least 1, got 0"),
    ("no points", lambda _: UltraSlowDiffusion(points_per_decade=0), "points_per_decade must be at least 1"),
    ("a reference that is gone", _fit(UltraSlowDiffusion(reference="/nowhere")), "does not exist: name a diffusion"),
    ("two points for a law", lambda _: fit_diffusion([1, 2], [0.1, 0.2]), "at least 5 points are needed"),
    ("a figure of no validation", lambda _: MapFigure(0), "every_n_validations must be at least 1"),
    ("an unknown cost", lambda _: MongeMap(dim=2, cost="manhatan"), "choose one of cosine, elastic"),
    ("a negative epsilon", lambda _: MongeMap(dim=2, gap_epsilon=-1.0), "gap_epsilon must be a positive"),
    ("a weight that is no number", lambda _: MongeMap(dim=2, gap_weight=math.nan), "gap_weight must be a finite"),
    ("samples of NaN", lambda _: monge_gap(_x(3, 2), _x(3, 2) * math.nan), "NaN or infinity in 3 of 3 rows"),
    ("samples of two dimensions", lambda _: sinkhorn_divergence(_x(3, 2), _x(3, 4)), "x has dimension 2 but y has 4"),
    ("a batch over the data", lambda _: SamplesDataModule(_x(4, 2), _x(4, 2), batch_size=64), "use batch_size <= 3"),
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    csv_run(folder / "run")
    (folder / "empty").mkdir()
    (folder / "foreign").mkdir()
    (folder / "foreign" / "metrics.csv").write_text("time,value\n1,2\n")
    (folder / "last.ckpt").write_bytes(b"PK\x03\x04 cut off")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "run-x.wandb").write_bytes(b":W&B\xe1\xbe\x00" + b"\x01\x00\x00\x00\x03\x00\x01abc")
    _write_samples(folder)
    return folder


def _write_samples(folder):
    """Write samples, tables, configurations and checkpoints of maps, good ones and others."""
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    for name, samples in (("a", x[:, :2]), ("b", x[:, 1:]), ("three", x), ("one", x[:, 0])):
        np.save(folder / f"{name}.npy", samples)
    x[7, 1] = np.nan
    np.save(folder / "nan.npy", x[:, :2])
    rows = [f"{i},{i + 1},c{i},{'ab'[i % 2]},{i}" for i in range(40)]
    (folder / "t.csv").write_text("\n".join(["u,v,cell,drug,dose_mg", *rows]) + "\n")
    (folder / "broken.yaml").write_text("model: {cost: [\n")
    (folder / "cots.yaml").write_text("model: {cots: euclidean}\n")
    (folder / "hiden.yaml").write_text("model: {map: {class_path: MLP, init_args: {dim: 2, hiden: [8]}}}\n")
    (folder / "folder.npy").mkdir()
    for name, model in (
        ("map", MongeMap(map=ResidualMLP(2, [4]))),
        ("drugs", MongeMap(map=ConditionalMap(2, [4], num_conditions=2), condition_names=["a", "b"])),
        ("other", BoringModel()),
    ):
        fit = Trainer(logger=False, accelerator="cpu", barebones=True)
        fit.strategy.connect(model)
        fit.save_checkpoint(folder / f"{name}.ckpt")


def _holds(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def _refused(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    # Lightning's own notices, such as that of the seed, are not ours.
    err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("INFO: "))
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("lightning-gap")
    assert "error: " in err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(("words", "said"), [row[1:] for row in COMMANDS], ids=[row[0] for row in COMMANDS])
def test_a_wrong_command_is_one_line_and_loses_nothing(words, said, files, capsys, monkeypatch, tmp_path):
    if "damaged" in words:
        pytest.importorskip("wandb")
    if words.startswith("report"):
        pytest.importorskip("matplotlib")
    if words.startswith("dashboard"):
        pytest.importorskip("wandb_workspaces")
    monkeypatch.chdir(tmp_path)
    before = _holds(files)
    assert said in _refused(capsys, words.replace("{}", str(files)).split())
    assert _holds(files) == before
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("words", "said"), [row[1:] for row in MAPS], ids=[row[0] for row in MAPS])
def test_a_wrong_use_of_maps_is_one_line_and_loses_nothing(words, said, files, capsys, monkeypatch, tmp_path):
    if not words.startswith("transport"):
        pytest.importorskip("jsonargparse")
    if ".csv" in words:
        pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    before = _holds(files)
    mapping = re.search(r"\{\w+: \w+\}", words)
    parts = words.replace(mapping[0], "MAPPING").split() if mapping else words.split()
    assert said in _refused(capsys, [part.replace("MAPPING", (mapping or [""])[0]).replace("{}", str(files))
                                     for part in parts])  # fmt: skip
    assert _holds(files) == before
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("module", "words", "said"), MISSING, ids=[row[0] for row in MISSING])
def test_a_missing_extra_is_named_with_its_remedy(module, words, said, files, capsys, monkeypatch, tmp_path):
    if module != "matplotlib":
        pytest.importorskip("matplotlib")
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    before = _holds(files)
    err = _refused(capsys, words.replace("{}", str(files)).split())
    assert said in err
    assert module.replace("_", "-") in err
    assert _holds(files) == before


def test_a_dashboard_without_a_key_says_how_to_log_in(capsys, monkeypatch):
    ws = pytest.importorskip("wandb_workspaces.workspaces")

    def save(self):
        raise RuntimeError("No API key\nconfigured")

    monkeypatch.setattr(ws.Workspace, "save", save)
    err = _refused(capsys, BOARD.split())
    assert "No API key configured" in err
    assert "wandb login" in err


@pytest.mark.parametrize(("do", "said"), [row[1:] for row in CODE], ids=[row[0] for row in CODE])
def test_wrong_code_is_refused_in_one_line(do, said, tmp_path):
    with pytest.raises((ValueError, TypeError, MisconfigurationException)) as refused:
        do(tmp_path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value).strip()
    assert len(str(refused.value)) > 20
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [
    lambda: LargeBatchRegime(4), GradientNoiseScale, lambda: GhostBatchNorm(4), UltraSlowDiffusion
])  # fmt: skip
def test_the_trainer_of_the_other_package_is_named(make):
    other = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.demos.boring_classes import BoringModel as Model

    trainer = other.Trainer(accelerator="cpu", barebones=True, max_steps=1, callbacks=[make()])
    with pytest.raises(MisconfigurationException, match=r"import Trainer and .* from lightning\.pytorch"):
        trainer.fit(Model())
