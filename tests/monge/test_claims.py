"""Claims of work: one holder at a time, and the dead are followed."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

from lightning_gap.monge import claims as module
from lightning_gap.monge.claims import Claims

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are asked for in /proc")


@pytest.fixture
def claims(tmp_path):
    return Claims(tmp_path / "claims", stale_after=60)


def of_a_dead_process(claims, what):
    """Claim in a process that is killed, and return the claim's file."""
    code = (
        "import os, signal, sys; from pathlib import Path; from lightning_gap.monge.claims import Claims\n"
        "assert Claims(Path(sys.argv[1])).take(sys.argv[2]) is not None; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(claims.folder), what], check=False)
    assert done.returncode == -signal.SIGKILL
    (path,) = claims.folder.iterdir()
    return path


def test_one_of_many_holds(claims):
    taken, start = [], threading.Barrier(8)

    def take():
        start.wait()
        taken.append(Claims(claims.folder).take("a"))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in taken) == 1
    assert claims.take("b") is not None


def test_what_is_given_back_can_be_claimed(claims):
    first = claims.take("a")
    first.release(done=False)
    second = claims.take("a")
    assert second.number == 0
    assert not first.holds()
    second.release(done=True)
    assert list(claims.folder.iterdir()) == []


def test_an_error_gives_it_back(claims):
    with pytest.raises(KeyboardInterrupt), claims.held("a"):
        raise KeyboardInterrupt
    assert list(claims.folder.iterdir()) == []


@linux
def test_the_dead_are_followed_at_once_and_by_one(claims):
    left = of_a_dead_process(claims, "a")
    claim = claims.take("a")
    assert claim.number == 1
    assert claims.take("a") is None
    assert claim.holds()
    claim.release(done=False)  # not done: the dead one's number stays taken
    assert [path.name for path in claims.folder.iterdir()] == [left.name]
    claims.take("a").release(done=True)
    assert list(claims.folder.iterdir()) == []


@linux
def test_a_number_that_another_process_has_now_is_no_life(claims):
    path = of_a_dead_process(claims, "a")
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": os.getpid()}))
    assert claims.take("a") is not None


@linux
def test_what_is_done_is_forgotten_but_for_the_living(claims):
    of_a_dead_process(claims, "a")
    mine = claims.take("b")
    claims.forget(["a", "b"])
    assert list(claims.folder.iterdir()) == [mine.path]


@linux
@pytest.mark.parametrize(("error", "taken"), [(ProcessLookupError, True), (PermissionError, False)])
def test_of_a_process_that_is_not_shown_silence_tells(claims, monkeypatch, error, taken):
    claims.take("a")

    def hidden(*_):
        raise error

    read = module.Path.read_bytes
    monkeypatch.setattr(module.Path, "read_bytes", lambda path: hidden() if path.name == "stat" else read(path))
    monkeypatch.setattr(module, "_this_process", dict)
    monkeypatch.setattr(os, "kill", hidden)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert (claims.take("a") is not None) is taken
    now[0] = 61.0
    assert (claims.take("a") is None) is taken


def test_on_other_systems_silence_tells(claims, monkeypatch):
    claim = claims.take("a")
    monkeypatch.setattr(module, "_system", lambda: None)  # nor here can processes be asked for
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for now[0] in (0.0, 50.0):
        assert claims.take("a") is None
    os.utime(claim.path, ns=(1, 1))  # whatever its clock says, it lives
    for now[0] in (61.0, 120.0):
        assert claims.take("a") is None
    now[0] = 122.0
    second = claims.take("a")
    assert second.number == 1
    assert not claim.holds()
    claim.release(done=False)  # who was only silent takes nothing away
    assert second.holds()
    assert claims.take("a") is None


def test_a_holder_is_heard(tmp_path):
    claims = Claims(tmp_path, stale_after=0.06)
    with claims.held("a") as claim:
        os.utime(claim.path, ns=(1, 1))
        deadline = time.monotonic() + 30
        while claim.path.stat().st_mtime_ns == 1:
            assert time.monotonic() < deadline
            time.sleep(0.005)


def test_a_heart_goes_on_after_an_error_of_a_moment(tmp_path, monkeypatch):
    claims, touch, beats = Claims(tmp_path, stale_after=0.06), os.utime, []

    def stale_at_first(*given):
        beats.append(given)
        if len(beats) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        touch(*given)

    monkeypatch.setattr(os, "utime", stale_at_first)
    with claims.held("a"):
        deadline = time.monotonic() + 30
        while len(beats) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.005)


@pytest.mark.parametrize("where", ["write", "start"])
def test_an_interrupt_before_the_first_beat_gives_it_back(claims, monkeypatch, where):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(*{"write": (os, "write"), "start": (threading.Thread, "start")}[where], interrupted)
    with pytest.raises(KeyboardInterrupt), claims.held("a"):
        pass
    assert list(claims.folder.iterdir()) == []


@linux
def test_who_lives_and_is_silent_is_waited_for_with_one_warning(claims, monkeypatch):
    claim, now = claims.take("a"), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert claims.take("a") is None
    now[0] = 61.0
    with pytest.warns(UserWarning, match=f"a is waited for: process {os.getpid()} has it.*{claim.path.name}"):
        assert claims.take("a") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert claims.take("a") is None


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_a_claim_is_no_program(claims):
    assert claims.take("a").path.stat().st_mode & 0o111 == 0


def test_a_claim_that_was_not_written_whole_is_silent(claims, monkeypatch):
    claim = claims.take("a")
    claim.path.write_bytes(b"")
    assert claims.take("a") is None
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    assert claims.take("a") is not None


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_silence_is_a_positive_time(tmp_path, seconds):
    with pytest.raises(ValueError, match="stale_after must be a positive finite number"):
        Claims(tmp_path, stale_after=seconds)
