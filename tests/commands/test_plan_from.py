"""``lightning-gap plan --from``: the trade-off is found again in runs of which it is known."""

import re

import pytest
from logged_runs import run_to_target

from lightning_gap.cli import main
from lightning_gap.commands.plan_from import duration, scaled


def said(capsys, *words):
    main(["plan", *map(str, words)])
    return capsys.readouterr().out


def row(text, label):
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return re.split(r"\s{2,}", line.strip())[1:]


def test_runs_at_several_batches_are_fitted(tmp_path, capsys):
    for batch in (16, 64, 256):
        run_to_target(tmp_path / f"b{batch}", batch)
    text = said(capsys, "--from", tmp_path, "--target", "val_loss<=0.3")
    assert row(text, "b64") == ["64", "200", "12,800", "–", "–", "held"]
    assert "fitted to 3 runs at 3 batches: 64 (95 %" in text
    assert "predicted within 0%" in text
    assert row(text, "×1: 16") == ["0.1", "0.01", "500", "8,000"]
    assert row(text, "×8: 128") == ["0.2828", "0.02828", "150", "19,200"]  # a batch that never ran
    assert "100 updates and 6,400 samples" in text


def test_one_run_with_a_noise_scale_is_enough(tmp_path, capsys):
    run = run_to_target(tmp_path / "run", 32, noise=64)
    text = said(capsys, "--from", run, "--target", "val_loss<=0.3", "--multiples", "1,4")
    assert "the gradient noise scale, 64, of batch 32" in text
    assert row(text, "×4: 128")[2:] == ["150", "19,200"]
    assert "×2" not in text
    # Without a target, to where the run ended: three times as many updates.
    assert row(said(capsys, "--from", run, "--multiples", "1,4"), "×4: 128")[2:] == ["450", "57,600"]


def test_the_noise_scale_stands_beside_the_fit(tmp_path, capsys):
    for batch in (16, 256):
        run_to_target(tmp_path / f"b{batch}", batch, noise=50)
    text = said(capsys, "--from", tmp_path, "--target", "val_loss<=0.3")
    assert "of unknown interval" in text
    assert "The gradient noise scale says 50." in text


def test_a_run_that_never_holds_is_told(tmp_path, capsys):
    for batch in (16, 64, 256):
        run_to_target(tmp_path / f"b{batch}", batch)
    run_to_target(tmp_path / "short", 64, short=True)
    assert row(said(capsys, "--from", tmp_path, "--target", "val_loss<=0.3"), "short")[-1] == "missed"


def test_a_run_whose_batch_changes_is_left_out(tmp_path, capsys):
    for batch in (16, 64):
        run_to_target(tmp_path / f"b{batch}", batch)
    growing = tmp_path / "growing"
    growing.mkdir()
    key = "lightning_gap/regime/batch_size"
    (growing / "metrics.csv").write_text(f"step,val_loss,{key}\n0,0.2,8\n1,0.2,16\n2,0.2,32\n")
    main(["plan", "--from", str(tmp_path), "--target", "val_loss<=0.3"])
    out, err = capsys.readouterr()
    assert "fitted to 2 runs" in out
    assert "growing: its batch changes" in err
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--from", str(growing)])
    assert "the batch of every run changes" in capsys.readouterr().err


def test_no_critical_batch_within_the_runs_is_said(tmp_path, capsys):
    for batch in (1, 2):
        run_to_target(tmp_path / f"b{batch}", batch)
    text = said(capsys, "--from", tmp_path, "--target", "val_loss<=0.3", "--lr", 0.5, "--beta2", 0.5, "--ema", 0.5)
    assert row(text, "×2: 2")[:4] == ["0.7071", "0.01414", "0.25", "0.25"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "val_loss<=0.01", "--hold", "30"], "none of the runs held it over 30 points: a "),
        (["--target", "acc>=0.9"], "no run logged acc; logged are val_loss"),
        (["--target", "val_loss"], "write METRIC>=VALUE"),
        ([], "2 runs are compared by a target"),
        (["--target", "val_loss<=0.3"], "b does not tell its samples per update: give --batch-size"),
        (["--target", "val_loss<=0.3", "--batch-size", "16"], "the runs have one batch, 16, and none logged"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path, capsys, words, message):
    run_to_target(tmp_path / "a", 16)
    run_to_target(tmp_path / "b", 16, told=False)
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--from", str(tmp_path), *words])
    assert message in capsys.readouterr().err


def test_no_runs_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--from", str(tmp_path / "nothing")])
    assert "does not exist" in capsys.readouterr().err


def test_the_options_are_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "--from", "run", "--help"])
    assert "--target" in capsys.readouterr().out


def test_half_lives_in_samples_stay():
    found = scaled(16, rule="linear", lr=0.1, weight_decay=0.01, beta2=0.999, ema=0.9999)
    assert found == pytest.approx({"lr": 1.6, "weight_decay": 0.01, "beta2": 0.999**16, "ema": 0.9999**16})
    assert scaled(4, weight_decay=0.01) == {"weight_decay": 0.02}


def test_times_in_words():
    assert [duration(x) for x in (0.5, 60, 119, 120, 7199, 7200)] == [
        "0.5 s",
        "60 s",
        "119 s",
        "2 min",
        "120 min",
        "2 h",
    ]
