"""Wrong uses: each gives one clear line that names the argument and the remedy, and loses nothing.

A row is what is wrong, how it is done, and what the line says. To add one, add a row: the words of a command, where
``{}`` is a folder with the files of `_files`, or a function that raises.
"""

import builtins
import math
import os
from pathlib import Path

import pytest
import torch
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
    ("a batch over the data", PLAN + "--samples 50 --epochs 2 --drop-last", "Use a smaller batch, or drop_last=False"),
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

MISSING = [
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
    ("a reference batch of nothing", lambda _: LargeBatchRegime(0), "reference_batch_size=0 must be at least 1"),
    ("an unknown rule", lambda _: LargeBatchRegime(8, lr_rule="cubic"), "pass one of"),
    ("a clipping norm of nothing", lambda _: LargeBatchRegime(8, clip_norm=0), "clip_norm=0 must be positive"),
    ("noise beside a larger rate", lambda _: LargeBatchRegime(8, gradient_noise=True), 'pass lr_rule="none"'),
    ("ghosts of one half", lambda _: GhostBatchNorm(0.5), "ghost_batch_size must be an int"),
    ("ghosts of nothing", lambda _: convert_ghost_batchnorm(torch.nn.Linear(2, 2), 0), "at least 1, got 0"),
    ("measured never", lambda _: GradientNoiseScale(every_n_updates=0), "every_n_updates=0 must be at least 1"),
    ("no points", lambda _: UltraSlowDiffusion(points_per_decade=0), "points_per_decade must be a positive integer"),
    ("a reference that is gone", _fit(UltraSlowDiffusion(reference="/nowhere")), "does not exist: name a diffusion"),
    ("two points for a law", lambda _: fit_diffusion([1, 2], [0.1, 0.2]), "at least 5 points are needed"),
    ("a figure of no validation", lambda _: MapFigure(0), "every_n_validations must be a positive integer"),
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
    return folder


def _holds(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def _refused(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
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
