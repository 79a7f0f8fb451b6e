"""Pages whose pictures are made by the code that they show.

A page's ``python`` blocks with a title are files, and its ``bash`` blocks commands, which run in a folder with the
files that a reader is told to have. A picture that they leave there and that the page shows goes to ``images/made``.

    python docs/hooks/pictures.py            # those whose code has changed since
    python docs/hooks/pictures.py start_cells gallery   # these pages
    python docs/hooks/pictures.py --check    # only say which are of other code

``docs/images/made/code.json`` holds a digest of the code that each page's pictures were made by.
"""

import argparse
import hashlib
import inspect
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from own_files import OWN_FILES

__all__ = ["DOCS", "PAGES", "Made", "parse", "stale"]

DOCS = Path(__file__).parents[1]
PICTURES = DOCS / "images" / "made"
DIGESTS = PICTURES / "code.json"
PAGES = ("start_images", "start_cells", "start_globe", "start_colours", "gallery")
# Packages that the project itself does without.
NEEDS = {"start_images": ("torchvision", "timm")}
_FENCE = re.compile(r'^```(?P<language>python|bash)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```', re.M | re.S)
_PICTURE = re.compile(r"\]\(images/made/([^)]+)\)")


@dataclass(frozen=True)
class Made:
    """A page whose pictures are made.

    Attributes:
        name: Of the page.
        files: The files that it shows, by name.
        commands: What is run, in turn, each a list of words.
        pictures: Names of the pictures that it shows.
    """

    name: str
    files: dict[str, str]
    commands: list[list[str]]
    pictures: list[str]

    @property
    def digest(self) -> str:
        """Of all that the pictures are made of: the page's code, and the reader's files."""
        own = inspect.getsource(OWN_FILES[self.name]) if self.name in OWN_FILES else ""
        text = json.dumps([self.files, self.commands, self.pictures, own])
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, folder: Path, share: float = 1.0) -> None:
        """Write the page's files and the reader's to a folder, of the latter a share of the rows."""
        for name, code in self.files.items():
            (folder / name).write_text(code, encoding="utf-8")
        if self.name in OWN_FILES:
            OWN_FILES[self.name](folder, share)


def parse(name: str, text: str) -> Made:
    """Return what a page's pictures are made of.

    Args:
        name: Of the page.
        text: The page. A file that no command names is run by itself.
    """
    files: dict[str, str] = {}
    commands: list[list[str]] = []
    for block in _FENCE.finditer(text):
        if block["language"] == "bash":
            lines = block["code"].replace("\\\n", " ").splitlines()
            commands += [shlex.split(line, comments=True) for line in lines if line.strip()]
        elif block["title"]:
            files[block["title"]] = block["code"]
    named = {word for command in commands for word in command}
    commands += [["python", file] for file in files if file not in named and "__name__" not in files[file]]
    return Made(name, files, commands, _PICTURE.findall(text))


def page(name: str) -> Made:
    """Return a page of the site."""
    return parse(name, (DOCS / f"{name}.md").read_text(encoding="utf-8"))


def stale(pages: Sequence[Made], digests: dict[str, str]) -> list[str]:
    """Return the names of pages whose pictures are of other code than they show, or missing."""
    return [
        made.name
        for made in pages
        if digests.get(made.name) != made.digest or not all((PICTURES / name).exists() for name in made.pictures)
    ]


def make(made: Made) -> None:
    """Run a page's commands, and keep its pictures."""
    missing = [package for package in NEEDS.get(made.name, ()) if find_spec(package) is None]
    if missing:
        raise SystemExit(f"docs/{made.name}.md has changed, and its pictures need: pip install {' '.join(missing)}")
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(DOCS.parent)}
    with tempfile.TemporaryDirectory() as folder:
        made.write(Path(folder))
        for command in made.commands:
            program = {
                "python": [sys.executable],
                "lightning-gap": [sys.executable, "-m", "lightning_gap"],
            }[command[0]]
            began = _processor_seconds()
            with (Path(folder) / "said.log").open("ab") as said:
                done = subprocess.run([*program, *command[1:]], cwd=folder, env=environment, stdout=said, stderr=said)
            if done.returncode:
                sys.stderr.write((Path(folder) / "said.log").read_text(encoding="utf-8"))
                raise SystemExit(f"docs/{made.name}.md: {shlex.join(command)} failed with {done.returncode}")
            print(
                f"{made.name}: {shlex.join(command)}: {_processor_seconds() - began:.0f} s of processor time",
                flush=True,
            )
        print((Path(folder) / "said.log").read_text(encoding="utf-8"), file=sys.stderr)
        left = [name for name in made.pictures if (Path(folder) / name).exists()]  # others are of other pages
        if not left:
            raise SystemExit(f"docs/{made.name}.md shows no picture that its code leaves")
        for name in left:
            _keep(Path(folder) / name)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _keep(picture: Path) -> None:
    """Copy a picture; a drawing in few colours, at a third of the size."""
    from PIL import Image

    with Image.open(picture) as drawn:
        if picture.suffix == ".png":
            drawn.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(PICTURES / picture.name, optimize=True)
        else:
            shutil.copy(picture, PICTURES / picture.name)


def main() -> None:
    """Make what is stale, or what is named, or say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"one of {', '.join(PAGES)}")
    parser.add_argument("--check", action="store_true", help="only say whose pictures are of other code")
    options = parser.parse_args()
    PICTURES.mkdir(parents=True, exist_ok=True)
    digests = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    pages = {name: page(name) for name in PAGES}
    chosen = options.pages or stale(list(pages.values()), digests)
    if options.check:
        raise SystemExit(f"pictures of other code than is shown: {', '.join(chosen)}" if chosen else 0)
    for name in chosen:
        make(pages[name])
        digests[name] = pages[name].digest
        DIGESTS.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
    print("Every picture is of the code that is shown.")


if __name__ == "__main__":
    main()
