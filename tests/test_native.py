"""C++ that is compiled on first use: once, for whom it is, and never a trap."""

import os
import subprocess
import sys
import warnings

import pytest

from lightning_gap import native

compiler = pytest.mark.compiler


@pytest.fixture
def compiled_anew(tmp_path, monkeypatch):
    """A folder of its own, and no memory of libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native._folder.cache_clear()
    native._native_library.cache_clear()
    yield tmp_path
    native._folder.cache_clear()
    native._native_library.cache_clear()


SOURCE = 'extern "C" double answer() { return ANSWER; }\n'


@compiler
def test_a_library_is_compiled_once_for_each_set_of_macros(compiled_anew, monkeypatch):
    source = compiled_anew / "answer.cpp"
    source.write_text(SOURCE)
    ran, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: ran.append(command) or run(command, **more))
    for text in ("1.5", "2.5", "1.5"):
        library = native.native_library(source, {"ANSWER": text})
        library.answer.restype = native.ctypes.c_double
        assert library.answer() == float(text)
    kept = sorted((compiled_anew / "cache" / "lightning_gap").iterdir())
    assert [path.suffix for path in kept] == [".so", ".so"]
    native._native_library.cache_clear()  # as another process
    ran.clear()
    assert native.native_library(source, {"ANSWER": "1.5"}) is not None
    assert [command[1:] for command in ran] == [["--version"]]


@compiler
def test_flags_that_a_compiler_does_not_know_are_left_out(compiled_anew, monkeypatch):
    monkeypatch.setattr(native, "_FAST", ("-march=native", "-no-such-flag"))
    native._fast_flags.cache_clear()
    assert native._fast_flags(native.compiler()) == ("-march=native",)
    native._fast_flags.cache_clear()


@compiler
def test_what_does_not_compile_is_warned_of_once(compiled_anew):
    source = compiled_anew / "answer.cpp"
    source.write_text(SOURCE)
    with pytest.warns(RuntimeWarning, match="does not make answer.cpp run here, so slower code is taken: .*answer.cpp"):
        assert native.native_library(source, {"ANSWER": "("}) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.native_library(source, {"ANSWER": "("}) is None
    assert list((compiled_anew / "cache" / "lightning_gap").iterdir()) == []


@compiler
def test_a_folder_that_cannot_be_written_to_is_replaced(compiled_anew, monkeypatch):
    (compiled_anew / "cache").write_text("a file")
    source = compiled_anew / "answer.cpp"
    source.write_text(SOURCE)
    assert native.native_library(source, {"ANSWER": "1.5"}) is not None


def test_a_compiler_may_be_named(monkeypatch):
    usual = native.compiler()
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert native.compiler() == usual
    monkeypatch.setenv("CXX", f"{sys.executable} -m64")
    assert native.compiler() == f"{sys.executable} -m64"


@compiler
def test_arguments_of_a_compiler_are_its_own(compiled_anew, monkeypatch):
    monkeypatch.setenv("CXX", f"{native.compiler()} -DANSWER=3.5")
    source = compiled_anew / "answer.cpp"
    source.write_text(SOURCE)
    library = native.native_library(source, {})
    library.answer.restype = native.ctypes.c_double
    assert library.answer() == 3.5


@compiler
def test_a_library_that_was_cut_short_is_made_again(compiled_anew):
    source = compiled_anew / "answer.cpp"
    source.write_text(SOURCE)
    assert native.native_library(source, {"ANSWER": "1.5"}) is not None
    (kept,) = (compiled_anew / "cache" / "lightning_gap").iterdir()
    kept.unlink()
    kept.write_bytes(b"")
    native._native_library.cache_clear()
    assert native.native_library(source, {"ANSWER": "1.5"}) is not None


@compiler
def test_another_s_folder_is_not_taken(compiled_anew):
    folder = compiled_anew / "cache" / "lightning_gap"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    source = compiled_anew / "answer.cpp"
    source.write_text(SOURCE)
    assert native.native_library(source, {"ANSWER": "1.5"}) is not None
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_leaves_its_parent_s_folder():
    native._own_folder.cache_clear()
    folder = native._own_folder()
    child = os.fork()
    if child == 0:
        try:
            native._remove(str(folder), os.getppid())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()
    native._remove(str(folder), os.getpid())
    assert not folder.exists()
    native._own_folder.cache_clear()
