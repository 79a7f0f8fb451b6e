"""Maps applied to folders of files: shares, claims, second runs, and what is refused."""

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gap import MongeMap
from lightning_gap.monge import ResidualMLP, transport_folder
from lightning_gap.monge.claims import Claims
from lightning_gap.monge.transport_files import transport_file
from lightning_gap.monge.transport_folder import transport_folder as run

NAMES = ("a.npy", "b.npy", "deep/c.npy", "deep/er/d.npy", "e.npy")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in NAMES:
        Path("in", name).parent.mkdir(parents=True, exist_ok=True)
        np.save(Path("in", name), generator.normal(size=(13, 2)).astype(np.float32))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MongeMap(map=ResidualMLP(2, [8]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def files(folder="out"):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def images(folder="out"):
    return {name: content for name, content in files(folder).items() if not name.startswith(".")}


def times(folder="out"):
    return {name: Path(folder, name).stat().st_mtime_ns for name in NAMES if Path(folder, name).exists()}


def test_every_file_is_mapped_as_alone(model):
    told = []
    done = run(model, "in", "out", progress=lambda files, total: told.append((files, total)))
    assert (done.files, done.mapped, done.rows, done.others) == (5, 5, 65, ())
    assert sorted(images()) == sorted(NAMES)
    for name in NAMES:
        transport_file(model, Path("in", name), "alone.npy", overwrite=True)
        assert images()[name] == Path("alone.npy").read_bytes()
    assert told == [(i, 5) for i in range(6)]
    assert sorted(set(files()) - set(NAMES)) == [".lightning_gap/asked.json"]
    assert not Path("out/.lightning_gap/claims").exists()


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".tsv", ".parquet", ".feather"])
def test_tables_of_any_format_have_the_same_bits_again(model, suffix):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"u": [1.0, 2.0], "v": [0.5, 3.0], "id": ["x", "y"]})
    Path("tables").mkdir()
    if "sv" in suffix:
        frame.to_csv(f"tables/t{suffix}", index=False, sep="\t" if "tsv" in suffix else ",")
    else:
        getattr(frame, f"to_{suffix[1:]}")(f"tables/t{suffix}")
    for out in ("out", "again"):
        assert run(model, "tables", out, columns=["u", "v"]).mapped == 1
    assert images() == images("again")


def test_a_second_run_does_what_is_missing(model):
    run(model, "in", "out")
    whole, before = images(), times()
    assert run(model, "in", "out").mapped == 0
    assert times() == before
    Path("out/deep/c.npy").unlink()
    np.save("in/new.npy", np.zeros((3, 2), np.float32))
    assert run(model, "in", "out").mapped == 2
    assert {name: images()[name] for name in NAMES} == whole
    assert {name: t for name, t in times().items() if name != "deep/c.npy"} == {
        name: t for name, t in before.items() if name != "deep/c.npy"
    }


def test_a_file_that_has_changed_is_mapped_again(model):
    run(model, "in", "out")
    np.save("in/b.npy", np.ones((4, 2), np.float32))
    later = Path("out/b.npy").stat().st_mtime_ns + 10**9  # by a clock that is ahead, too
    os.utime("in/b.npy", ns=(later, later))
    assert run(model, "in", "out").mapped == 1
    assert len(np.load("out/b.npy")) == 4
    assert run(model, "in", "out").mapped == 0


def test_a_rank_begins_with_its_share_and_does_what_nobody_does(model, monkeypatch):
    order, map_file = [], transport_folder._Folder.map

    def noted(self, name, *rest):
        order.append(name)
        return map_file(self, name, *rest)

    monkeypatch.setattr(transport_folder._Folder, "map", noted)
    assert run(model, "in", "out", rank=1, ranks=2).mapped == 5
    assert order == ["b.npy", "deep/er/d.npy", "a.npy", "deep/c.npy", "e.npy"]


def test_many_at_once_map_each_file_once(model):
    start, done = threading.Barrier(3), []

    def work(rank):
        start.wait()
        done.append(run(model, "in", "out", rank=rank, ranks=3))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(each.mapped for each in done) == 5
    assert sum(each.rows for each in done) == 65
    run(model, "in", "alone")
    assert images() == images("alone")


def test_what_another_holds_is_waited_for(model, monkeypatch):
    claims = Claims(Path("out/.lightning_gap/claims"))
    claims.folder.mkdir(parents=True)
    other, slept = claims.take("a.npy"), []

    def sleep(seconds):
        slept.append(seconds)
        assert sorted(images()) == sorted(set(NAMES) - {"a.npy"})
        if len(slept) == 3:  # the other one gives up
            other.release(done=False)

    monkeypatch.setattr(transport_folder.time, "sleep", sleep)
    assert run(model, "in", "out").mapped == 5
    assert slept == [0.02, 0.04, 0.08]


def test_who_was_taken_for_dead_does_not_write_over_the_other(model, monkeypatch):
    real = transport_folder.transport_blocks

    def slow(model, source, output, *, finished, **options):
        def overtaken(part):
            (claim,) = Path("out/.lightning_gap/claims").glob("*.0")
            claim.with_suffix(".1").write_text("{}")
            monkeypatch.setattr(os, "replace", None)
            finished(part)

        return real(model, source, output, finished=overtaken, **options)

    Path("one").mkdir()
    np.save("one/a.npy", np.zeros((3, 2), np.float32))
    monkeypatch.setattr(transport_folder, "transport_blocks", slow)
    folder = transport_folder._Folder(Path("one"), Path("out"), 60.0)
    options = {"condition": None, "columns": None, "batch_size": 8, "block_size": None}
    assert folder.map("a.npy", model, options) is None
    assert images() == {}
    assert not list(Path("out/.lightning_gap/parts").iterdir())


def test_a_file_that_changes_meanwhile_is_refused(model, monkeypatch):
    real, times = MongeMap.transport, iter(range(9))

    def transport(self, x, *rest, **options):
        os.utime("in/b.npy", ns=(0, next(times)))
        return real(self, x, *rest, **options)

    monkeypatch.setattr(MongeMap, "transport", transport)
    with pytest.raises(ValueError, match=r"1 of 5 files .* b.npy: it changed while it was mapped"):
        run(model, "in", "out")
    assert sorted(images()) == sorted(set(NAMES) - {"b.npy"})


def test_bad_files_are_said_when_all_others_are_there(model):
    np.save("in/b.npy", np.full((3, 2), np.nan, np.float32))
    np.save("in/e.npy", np.zeros((3, 5), np.float32))
    with pytest.raises(ValueError, match=r"2 of 5 files cannot be mapped: b.npy: .* row 0.*, and 1 more: e.npy"):
        run(model, "in", "out")
    assert sorted(images()) == ["a.npy", "deep/c.npy", "deep/er/d.npy"]
    for name in ("b.npy", "e.npy"):
        np.save(Path("in", name), np.zeros((3, 2), np.float32))
    assert run(model, "in", "out").mapped == 2


def test_what_the_system_says_of_one_file_leaves_the_others(model, monkeypatch):
    Path("in/0.npy").symlink_to("nowhere.npy")
    Path("out/deep").mkdir(parents=True)
    Path("out/deep/er").touch()  # a file where a folder is to be
    real = transport_folder.transport_blocks

    def removes(*given, **options):
        Path("in/e.npy").unlink(missing_ok=True)
        return real(*given, **options)

    monkeypatch.setattr(transport_folder, "transport_blocks", removes)
    with pytest.raises(ValueError, match=r"3 of 6 files cannot be mapped: 0.npy: .*, and 2 more: deep/er/d.npy, e.npy"):
        run(model, "in", "out")
    assert sorted(set(images()) & set(NAMES)) == ["a.npy", "b.npy", "deep/c.npy"]
    assert not Path("out/.lightning_gap/claims").exists()


def test_what_would_befall_all_ends_the_run(model, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transport_folder, "transport_blocks", full)
    with pytest.raises(OSError, match="No space left"):
        run(model, "in", "out")
    assert not list(Path("out/.lightning_gap/claims").iterdir())


def test_links_to_folders_are_named(model):
    Path("in/linked").symlink_to("deep")
    Path("in/deep/round").symlink_to("..")
    done = run(model, "in", "out")
    assert (done.files, done.others) == (5, ("deep/round", "linked"))


def test_times_in_whole_seconds_and_a_clock_that_is_ahead_end(model, monkeypatch):
    touch = os.utime

    def coarse(path, times=None, *, ns=None):
        touch(path, times, **({} if ns is None else {"ns": tuple(t // (2 * 10**9) * 2 * 10**9 for t in ns)}))

    ahead = time.time_ns() + 31 * 10**9 + 1
    touch("in/b.npy", ns=(ahead, ahead))
    monkeypatch.setattr(os, "utime", coarse)
    assert run(model, "in", "out").mapped == 5
    assert Path("out/b.npy").stat().st_mtime_ns >= ahead
    assert run(model, "in", "out").mapped == 0


def test_who_was_taken_for_dead_and_finds_its_part_removed_goes_on(model, monkeypatch):
    def overtaken(*_, part, **__):
        (claim,) = Path("out/.lightning_gap/claims").glob("*.0")
        claim.with_suffix(".1").write_text("{}")
        part.open()

    monkeypatch.setattr(transport_folder, "transport_blocks", overtaken)
    folder = transport_folder._Folder(Path("in"), Path("out"), 60.0)
    assert folder.map("a.npy", model, {}) is None


def test_files_without_rows_are_named(model):
    np.save("in/a.npy", np.zeros((0, 2), np.float32))
    Path("in/0.csv").write_text("u,v\n")
    for mapped in (4, 0):
        done = run(model, "in", "out")
        assert (done.files, done.mapped, done.others) == (4, mapped, ("0.csv", "a.npy"))
    assert sorted(images()) == sorted(set(NAMES) - {"a.npy"})


def test_parts_of_who_died_are_removed_when_all_is_there(model):
    folder = transport_folder._Folder(Path("in"), Path("out"), 60.0)
    run(model, "in", "out")
    claim, alive = folder._claims.take("a.npy"), folder._claims.take("b.npy")
    for each in (claim, alive):
        folder._part(each).parent.mkdir(exist_ok=True)
        folder._part(each).touch()
    claim.path.unlink()
    run(model, "in", "out")
    assert list(Path("out/.lightning_gap/parts").iterdir()) == [folder._part(alive)]


def test_without_links_one_request_wins(model, monkeypatch):
    def refused(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    folder, noted = transport_folder._Folder(Path("in"), Path("out"), 60.0), Path("out/.lightning_gap/asked.json")
    for asked in ({"map": "one"}, {"map": "other"}):  # neither has seen the other
        folder._note(noted, asked)
    folder.agree({"map": "one"})
    with pytest.raises(FileExistsError, match="images of another map"):
        folder.agree({"map": "other"})
    assert [path.name for path in noted.parent.iterdir()] == ["asked.json"]


@pytest.mark.parametrize("content", ["", '{"map": ', "[]"])
def test_what_was_asked_is_waited_for_and_then_refused(model, monkeypatch, content):
    run(model, "in", "out")
    noted, slept = Path("out/.lightning_gap/asked.json"), []
    whole = noted.read_text()
    noted.write_text(content)
    monkeypatch.setattr(transport_folder.time, "sleep", slept.append)
    with pytest.raises(ValueError, match=r"asked.json' is damaged.*: delete that folder, or choose another"):
        run(model, "in", "out")
    assert sum(slept) > 3
    monkeypatch.setattr(transport_folder.time, "sleep", lambda _: noted.write_text(whole))
    assert run(model, "in", "out").mapped == 0


def test_what_cannot_be_mapped_is_told(model):
    Path("in/README.md").write_text("read me")
    Path("in/_SUCCESS").touch()
    Path("in/.hidden.npy").touch()
    np.savez("in/z.npz", x=np.zeros((2, 2)))
    assert run(model, "in", "out").others == ("README.md", "z.npz")


def test_another_map_or_other_options_are_refused(model):
    run(model, "in", "out")
    whole = files()
    with pytest.raises(FileExistsError, match="images of another batch size: choose another folder, or delete"):
        run(model, "in", "out", batch_size=7)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(FileExistsError, match="images of another map"):
        run(model, "in", "out")
    assert files() == whole


def test_foreign_files_are_not_taken_for_images(model):
    Path("out").mkdir()
    Path("out/b.npy").write_text("mine")
    with pytest.raises(FileExistsError, match=r"has a b.npy that this command has not written"):
        run(model, "in", "out")
    assert files() == {"b.npy": b"mine"}


@pytest.mark.parametrize(
    ("source", "output", "options", "said"),
    [
        ("nowhere", "out", {}, "IN: there is no folder 'nowhere'"),
        ("in", "in", {}, "are in one another"),
        ("in", "in/out", {}, "are in one another"),
        ("in/deep", "in", {}, "are in one another"),
        ("in", "in/a.npy", {}, "is a file, and IN is a folder"),
        ("empty", "out", {}, "has no file whose name ends in one of .npy"),
        ("in", "out", {"rank": 2, "ranks": 2}, "rank must be below ranks=2, got 2"),
        ("in", "out", {"stale_after": 0}, "stale_after must be a positive"),
        ("in", "out", {"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_wrong_uses_write_nothing(model, source, output, options, said):
    Path("empty").mkdir()
    before = sorted(Path().rglob("*"))
    with pytest.raises((OSError, ValueError), match=said):
        run(model, source, output, **options)
    assert sorted(Path().rglob("*")) == before
