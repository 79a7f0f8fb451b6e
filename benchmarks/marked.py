"""Blocks of a page that are made from logs: ``<!-- name -->`` to ``<!-- end of name -->``."""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.logs import RESULTS
from benchmarks.processes import ROOT

__all__ = ["DOCS", "command", "differences", "mean_and_std", "table", "write"]

DOCS = ROOT / "docs"


def command(
    description: str | None,
    name: str,
    blocks: Callable[[Path], Mapping[str, str]],
    draw: Callable[[Path, Path], None],
    arguments: Sequence[str] | None = None,
) -> None:
    """Write a page of results and its figures from its logs, or check it, as a command line says.

    Args:
        description: The script's docstring, for ``--help``.
        name: Of the page.
        blocks: From the folder of logs to the text of each block, by name.
        draw: Takes the folder of logs, and that of the figures.
        arguments: The command line; by default the process's.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=DOCS / "results" / f"{name}.md")
    parser.add_argument("--images", type=Path, default=DOCS / "images")
    parser.add_argument("--check", action="store_true", help="only say which blocks the logs contradict")
    options = parser.parse_args(arguments)
    made = blocks(options.logs)
    if options.check:
        wrong = differences(options.page, made)
        raise SystemExit(f"{options.page.name} contradicts its logs in: {', '.join(wrong)}" if wrong else 0)
    write(options.page, made)
    options.images.mkdir(parents=True, exist_ok=True)
    draw(options.logs, options.images)


def write(page: Path, blocks: Mapping[str, str]) -> None:
    """Write the blocks of a page anew.

    Args:
        page: A Markdown file with a pair of marks for each block.
        blocks: Their text, by name.

    Raises:
        ValueError: The page has no such block.
    """
    page.write_text(_filled(page, blocks), encoding="utf-8")


def differences(page: Path, blocks: Mapping[str, str]) -> list[str]:
    """Return the names of the blocks that differ from what the logs say."""
    text = page.read_text(encoding="utf-8")
    return [name for name in blocks if _filled(page, {name: blocks[name]}) != text]


def _filled(page: Path, blocks: Mapping[str, str]) -> str:
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{page.name} needs the marks {marks[0]} and {marks[1]} once.")
        made = f"{marks[0]}\n\n{block.strip()}\n\n{marks[1]}"
        text = pattern.sub(lambda _, made=made: made, text)
    return text


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mean_and_std(values: Sequence[float], digits: int = 2) -> str:
    """Return "mean ± standard deviation", with the number of values where it is not three."""
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return f"{mean} (1 seed)"
    seeds = "" if len(values) == 3 else f" ({len(values)} seeds)"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}{seeds}"
