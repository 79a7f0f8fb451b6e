"""Pages whose pictures are made by their code: the code runs, and the pictures are of the code that is shown."""

import json
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import image_packages
import pytest

from lightning_gap.cli import main

sys.path.append(str(Path(__file__).parents[1] / "docs" / "hooks"))

import pictures

NEEDED = {"start_cells": ["anndata", "h5py"], "start_globe": ["pandas"], "start_images": ["PIL", "sklearn", "pandas"]}
NEEDED |= {"start_colours": ["PIL", "sklearn"], "gallery": ["pandas"]}


def test_files_commands_and_pictures_are_read_from_a_page():
    text = '```python title="a.py"\nprint(1)\n```\n```bash\npython a.py \\\n  --b 2\n```\n'
    text += '```python title="c.py"\n1\n```\n```sh\nno\n```\n![.](images/made/d.png)'
    made = pictures.parse("page", text)
    assert made.files == {"a.py": "print(1)\n", "c.py": "1\n"}
    assert made.commands == [["python", "a.py", "--b", "2"], ["python", "c.py"]]
    assert made.pictures == ["d.png"]
    assert made.digest != pictures.parse("page", text.replace("print(1)", "print(2)")).digest


def test_pictures_are_of_the_code_that_is_shown():
    digests = json.loads(pictures.DIGESTS.read_text(encoding="utf-8"))
    assert pictures.stale([pictures.page(name) for name in pictures.PAGES], digests) == [], "run `make docs`"


def test_every_picture_is_shown():
    shown = {name for page in pictures.PAGES for name in pictures.page(page).pictures}
    assert {path.name for path in pictures.PICTURES.iterdir()} - {"code.json"} == shown


def _shortened(code):
    for number, few in {"max_epochs=": 1, "max_steps=": 2, r"\bbatch_size=": 32}.items():
        code = re.sub(rf"({number})\d+", rf"\g<1>{few}", code)
    return re.sub(r"\b[1-6][05]00\b", "100", code)  # samples


# A run of an epoch or of two updates, on a few samples.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("brief_starts")
@pytest.mark.parametrize("name", pictures.PAGES)
def test_a_page_runs_from_a_reader_s_files_to_its_picture(name, tmp_path, monkeypatch):
    for package in ("matplotlib", *NEEDED[name]):
        pytest.importorskip(package)
    if name == "start_images" and not (find_spec("torchvision") and find_spec("timm")):
        image_packages.install(monkeypatch)
    made = pictures.page(name)
    short = {file: _shortened(code) for file, code in made.files.items()}
    pictures.Made(name, short, made.commands, made.pictures).write(tmp_path, share=0.2)
    monkeypatch.chdir(tmp_path)
    for program, *words in made.commands:
        words = ["1" if before == "--epochs" else word for before, word in zip(["", *words], words, strict=False)]
        if program == "lightning-gap":
            main(words)
        else:
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(words[0], run_name="__main__")
    left = {path.name for path in tmp_path.iterdir()}
    own = {picture for picture in made.pictures if name != "gallery" or Path(picture).stem + ".py" in made.files}
    assert own <= left
