"""The large-batch paper's tables: networks and images as published, from training to the page, page and logs."""

import csv
import json
import multiprocessing
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("jsonargparse")

from benchmarks import logs as kept
from benchmarks import marked
from benchmarks.science.large_batch import images, networks, potential, reproduce, results, train

FOLDER = Path(train.__file__).parent


def _pictures(path, size, channels=()):
    draws = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 512), ("test", 64)):
        labels = draws.integers(10, size=n).astype(np.uint8)
        pixels = draws.integers(0, 201, size=(n, size, size, *channels)) + 6 * labels.reshape(
            -1, *[1] * (2 + len(channels))
        )
        arrays |= {f"{part}_images": pixels.astype(np.uint8), f"{part}_labels": labels}
    np.savez(path, **arrays)
    return path


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    """LightningCLI warns where the process has arguments of its own."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.fixture
def pictures(tmp_path):
    return _pictures(tmp_path / "pictures.npz", 28)


def _in_a_fork(module, *words, stdout, stderr):
    """Run what a fresh process would in one that has imported it already."""

    def run():
        warnings.simplefilter("ignore")
        with redirect_stdout(stdout), redirect_stderr(stdout):
            train.main(list(words))

    assert (module, stderr) == (reproduce.TRAIN, subprocess.STDOUT)
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return subprocess.CompletedProcess(words, process.exitcode)


@pytest.fixture
def forked(monkeypatch):
    """Rows are trained by forks, where these do not hang: in a process that has computed on one thread."""
    if torch.get_num_threads() == 1:
        monkeypatch.setattr(reproduce, "run_module", _in_a_fork)


def _count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_networks_have_the_published_sizes():
    f1 = 785 * 512 + 4 * 513 * 512 + 5 * 2 * 512 + 513 * 10
    assert _count(networks.F1()) == _count(networks.F1("layer")) == f1
    c1 = 64 * 75 + 64 * 1600 + 4 * 64 + 3136 * 384 + 2 * 384 + 384 * 192 + 2 * 192 + 193 * 10
    assert _count(networks.C1()) == c1
    convolutions = [
        m for m in networks.ResNet44().modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert len(convolutions) + 1 == 44
    for network, shape in (
        (networks.F1(), (1, 28, 28)),
        (networks.C1(), (3, 32, 32)),
        (networks.ResNet44(), (3, 32, 32)),
    ):
        assert network(torch.zeros(2, *shape)).shape == (2, 10)
    with pytest.raises(ValueError, match="normalization='group'"):
        networks.F1("group")


def test_phases_go_up_and_down():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.001)
    scheduler = networks.Phases(optimizer, {0: 1.0, 2: 10.0, 3: 0.1})
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.001, 0.001, 0.01, 0.0001, 0.0001])


@pytest.mark.parametrize(("size", "channels", "padding"), [(28, (), 2), (32, (3,), 4)])
def test_augmentation_moves_and_mirrors(tmp_path, size, channels, padding):
    path = _pictures(tmp_path / "p.npz", size, channels)
    colours = channels[0] if channels else 1
    data = images.Images(str(path), 16, padding, 7, mean=(0.5,) * colours, std=(0.25,) * colours, seed=3)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(5)
    x, y = next(iter(loader))
    # The same draws, one image at a time.
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 5)
    rows = torch.randperm(512, generator=generator)[:16]
    mirrored = torch.randint(2, (16,), generator=generator)
    down, right = torch.randint(2 * padding + 1, (2, 16), generator=generator)
    pixels, labels = images.read(path, "train")
    for place, row in enumerate(rows.tolist()):
        picture = pixels[row].reshape(size, size, colours)
        picture = picture[:, ::-1] if mirrored[place] else picture
        around = [(padding, padding), (padding, padding), (0, 0)]
        padded = np.pad(picture, around, constant_values=7)
        i, j = int(down[place]), int(right[place])
        expected = (padded[i : i + size, j : j + size] / 255 - 0.5) / 0.25
        np.testing.assert_allclose(x[place].permute(1, 2, 0), expected, atol=1e-5)
        assert y[place] == labels[row]


def test_images_are_held_out_of_training_to_choose_by(pictures):
    every, data = images.Images(str(pictures)), images.Images(str(pictures), held_out=0.25)
    every.setup("fit")
    data.setup("fit")
    assert (len(data.train), len(data.test)) == (384, 128)
    both = torch.cat((data.train.images, data.test.images)).flatten(1).tolist()
    assert sorted(both) == sorted(every.train.images.flatten(1).tolist())
    assert len(every.test) == len(images.read(pictures, "test")[1])


def test_an_epochs_order_has_a_name(pictures):
    def first(seed, epoch):
        data = images.Images(str(pictures), 64, seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return next(iter(loader))[0]

    assert torch.equal(first(0, 1), first(0, 1))
    assert not torch.equal(first(0, 1), first(0, 2))
    assert not torch.equal(first(0, 1), first(1, 1))


def test_a_folder_of_idx_files_is_read(tmp_path):
    import gzip

    pixels, labels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28), np.array([3, 7], np.uint8)
    for part in ("train", "t10k"):
        header = np.array([2051, 2, 28, 28], ">i4").tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
        header = np.array([2049, 2], ">i4").tobytes()
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))
    found, names = images.read(tmp_path, "test")
    assert (found == pixels).all()
    assert names.tolist() == [3, 7]


@pytest.mark.parametrize("network", reproduce.TABLE)
def test_every_row_has_a_configuration(network):
    for column, options in reproduce.TABLE[network].items():
        files = [FOLDER / f"{network}.yaml", reproduce.column_file(column)]
        words = [word for file in files for word in ("--config", str(file))]
        cli = train.CLI(train.Classifier, images.Images, args=[*words, "--trainer.logger=false", *options], run=False)
        batch = 1024 if options == reproduce.BATCH else yaml.safe_load(files[1].read_text())["data"]["batch_size"]
        assert cli.datamodule.batch_size == batch
        assert cli.trainer.gradient_clip_val == 5.0


SHORT = ["--trainer.max_epochs", "4", "--model.lr_scheduler.init_args.milestones", "[2]", "--data.batch_size"]


def test_from_training_to_the_page(pictures, tmp_path, request):
    logs, runs, page = tmp_path / "logs", tmp_path / "runs", tmp_path / "page.md"
    reproduce.run("f1_mnist", "sb", 0, pictures, runs, logs, [*SHORT, "128"])
    request.getfixturevalue("forked")  # one fresh process proves that it can be
    reproduce.run("f1_mnist", "ra", 0, pictures, runs, logs, [*SHORT, "512"])
    log = logs / "large_batch_f1_mnist.jsonl"
    before = kept.read(log)
    assert [(row["column"], row["seed"]) for row in before] == [("sb", 0), ("ra", 0)]
    reproduce.run("f1_mnist", "ra", 0, pictures, runs, logs, [*SHORT, "512"])
    assert kept.read(log) == before  # not repeated
    found = results.read(logs)["f1_mnist"]
    assert [found[column][0].updates[-1] for column in ("sb", "ra")] == [16, 16]
    assert [found[column][0].epochs[-1] for column in ("sb", "ra")] == [4, 16]
    assert len(found["ra"][0].error) == 4  # tested every reference epoch
    assert found["ra"][0].facts["cpu_seconds"] > 0
    probe = potential.probe("f1_mnist", str(pictures), 5.0, 32, 40, 0)
    kept.append(logs / "large_batch_potential.jsonl", probe)
    made = results.blocks(results.read(logs)) | {"potential": results.potential_block(logs)}
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in made))
    assert marked.differences(page, made) == list(made)
    marked.write(page, made)
    assert marked.differences(page, made) == []
    assert f"{found['ra'][0].accuracy:.2f} (1 seed)" in page.read_text()
    pytest.importorskip("matplotlib")
    results.draw(results.read(logs), logs, tmp_path)
    assert (tmp_path / "large_batch_error.png").stat().st_size > 10_000


@pytest.mark.usefixtures("forked")
def test_a_run_that_was_interrupted_goes_on(pictures, tmp_path):
    """The log of a run in two parts is that of a run in one."""
    logs, whole, halves = tmp_path / "logs", tmp_path / "whole", tmp_path / "halves"
    reproduce.run("f1_mnist", "ra", 0, pictures, whole, logs / "whole", [*SHORT, "512"])
    folder = halves / "f1_mnist" / "ra" / "0"
    folder.mkdir(parents=True)
    # What a process leaves that is killed in its second reference epoch: a checkpoint, logs that go too far, its lock.
    (folder / "running").write_text("999999999")
    words = ["fit", "--config", str(FOLDER / "f1_mnist.yaml"), "--config", str(FOLDER / "columns" / "ra.yaml")]
    words += [
        "--data.path",
        str(pictures),
        *SHORT,
        "512",
        "--trainer.logger",
        "CSVLogger",
        "--trainer.limit_val_batches",
        "1",
    ]
    words += [
        "--trainer.logger.save_dir",
        str(folder),
        "--trainer.logger.name",
        "",
        "--trainer.logger.version",
        "part0",
    ]
    with pytest.MonkeyPatch.context() as patch:
        saved = train.Classifier.validation_step

        def die(self, batch, batch_idx):
            if self.trainer.global_step > 8:
                raise KeyboardInterrupt
            return saved(self, batch, batch_idx)

        patch.setattr(train.Classifier, "validation_step", die)
        with pytest.raises(SystemExit):
            train.main(words)
    (folder / "cost.jsonl").write_text('{"cpu_seconds": 1.0, "seconds": 1.0}\n')
    reproduce.run("f1_mnist", "ra", 0, pictures, halves, logs / "halves", [*SHORT, "512"])
    found = [results.read(logs / name)["f1_mnist"]["ra"][0] for name in ("whole", "halves")]
    assert found[0].error == found[1].error
    assert found[0].updates == found[1].updates
    assert found[0].walk == found[1].walk
    assert found[1].facts["parts"] == 2


def test_an_interrupted_part_counts_in_the_cost_and_leaves_no_lock(tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "run_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce.run("f1_mnist", "sb", 0, tmp_path / "absent.npz", tmp_path / "runs", tmp_path / "logs", [])
    folder = tmp_path / "runs" / "f1_mnist" / "sb" / "0"
    assert json.loads((folder / "cost.jsonl").read_text())["seconds"] >= 0
    assert not (folder / "running").exists()


def test_logs_of_parts_are_joined(tmp_path):
    folder = tmp_path / "run"
    # The order is that of numbers, and a part that was interrupted at once has logged nothing.
    (folder / "part3").mkdir(parents=True)
    for part, steps in ((2, (1, 2, 3, 4)), (10, (3, 4, 5))):
        (folder / f"part{part}").mkdir()
        (folder / f"part{part}.log").touch()
        with (folder / f"part{part}" / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["epoch", "step", "test_error", "other"])
            writer.writeheader()
            for step in steps:
                writer.writerow({"epoch": 0, "step": step, "test_error": 100 * part + step, "other": 1})
            writer.writerow({"epoch": 0, "step": steps[-1], "other": 2})
    (folder / "cost.jsonl").write_text('{"cpu_seconds": 1.5, "seconds": 2}\n{"cpu_seconds": 2, "seconds": 3}\n')
    found = reproduce.log_of(folder, ["--trainer.precision", "bf16-mixed"])
    assert found["log"]["step"] == [1, 2, 3, 4, 5]
    assert found["log"]["test_error"] == [201, 202, 1003, 1004, 1005]
    assert found["log"]["distance"] == [None] * 5
    assert (found["cpu_seconds"], found["parts"], found["precision"]) == (3.5, 2, "bf16-mixed")


def test_the_page_says_what_its_logs_say():
    made = results.blocks(results.read(kept.RESULTS)) | {"potential": results.potential_block(kept.RESULTS)}
    assert marked.differences(results.PAGE, made) == []
