"""The command line: quick help, and one line for each wrong use."""

import builtins
import subprocess
import sys

import pytest

import lightning_gap
from lightning_gap.cli import main


def _refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "error:" in err
    return err


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys\nfrom lightning_gap.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as ended:\n"
        "    print('code', ended.code, [m for m in ('torch', 'lightning', 'numpy', 'rich') if m in sys.modules])\n"
    )
    for option, said in (("--help", "demo"), ("--version", lightning_gap.__version__)):
        out = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True, check=True).stdout
        assert said in out
        assert out.endswith("code 0 []\n")


def test_the_demo_lists_its_options(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for option in ("--data", "--output", "--seeds", "--epochs", "--large-batch", "--iterations"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["demo", "--data", "cifar"], "cifar"),
        (["demo", "--seeds", "0"], "at least 1"),
        (["demo", "--seeds", "two"], "not a whole number"),
        (["demo", "--epochs", "4"], "at least 5"),
        (["demo", "--large-batch", "128"], "at least 256"),
        (["demo", "--iterations", "-1"], "at least 1"),
        (["demo", "--colour", "red"], "--colour"),
    ],
)
def test_wrong_options_are_one_line(capsys, arguments, said):
    assert said in _refused(capsys, *arguments)


def test_missing_fashion_mnist_names_the_package(capsys, monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    from lightning_gap.demo import run
    from lightning_gap.demo.datasets import fashion_mnist

    monkeypatch.setattr(run, "load_images", lambda name: fashion_mnist(tmp_path))
    err = _refused(capsys, "demo", "--data", "fashion-mnist", "--output", str(tmp_path / "out"))
    assert "apt-get install dataset-fashion-mnist" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["matplotlib", "mlxtend", "sklearn", "PIL"])
def test_a_missing_extra_is_named_with_its_remedy(capsys, monkeypatch, tmp_path, missing):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == missing:
            raise ImportError(name)
        return real(name, *rest)

    import lightning_gap.demo  # noqa: F401

    monkeypatch.setattr(builtins, "__import__", without)
    err = _refused(capsys, "demo", "--output", str(tmp_path / "out"))
    assert missing in err
    assert "pip install 'lightning_gap[data,plots]'" in err


PLAN = "plan --batch-size 64 --reference-batch-size 16 --samples 999 --epochs 9 --lr 0.1 --milestones 3,6"


@pytest.mark.parametrize("words", [PLAN, PLAN.replace("--milestones 3,6", "--scheduler cosine")])
def test_a_plan_is_arithmetic_without_torch(words):
    code = (
        "import sys\nfrom lightning_gap.cli import main\nmain(sys.argv[1:])\n"
        "print([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, *words.split()]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "learning rate, 100 % of the way" in out
    assert out.endswith("[]\n")


@pytest.fixture
def _few_images(monkeypatch, request):
    """Four training images, or as many as are asked for, in place of the digits, which take seconds to read."""
    torch = pytest.importorskip("torch")
    from lightning_gap.demo import run
    from lightning_gap.demo.datasets import ImageSplit

    count = getattr(request, "param", 4)
    part = (torch.zeros(count, 784), torch.zeros(count, dtype=torch.int64))
    monkeypatch.setattr(run, "load_images", lambda name: ImageSplit("four", part, part))
    monkeypatch.setattr(run, "_require_extras", lambda: None)


@pytest.mark.parametrize("_few_images", [256], indirect=True)
@pytest.mark.usefixtures("_few_images")
def test_an_output_that_is_a_file_is_refused_before_training(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    words = ("demo", "--large-batch", "256", "--output", str(tmp_path / "taken"))
    assert "choose another folder" in _refused(capsys, *words)


@pytest.mark.usefixtures("_few_images")
def test_a_batch_over_the_data_is_refused(capsys, tmp_path):
    err = _refused(capsys, "demo", "--output", str(tmp_path))
    assert "4 training images" in err
