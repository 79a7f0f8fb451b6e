"""``lightning-gap report``: runs compared on one HTML page."""

import argparse
import sys
import webbrowser
from pathlib import Path
from typing import Any

from lightning_gap.commands.parsing import CommandError, at_least, write_text

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command to a parser."""
    report = commands.add_parser(
        "report",
        help="compare runs on one self-contained HTML page",
        description="Read runs from the files of Lightning's CSVLogger, TensorBoardLogger, WandbLogger (offline) and "
        "MLFlowLogger (local file store), and of Trackio, and write one page that needs no network: results with the "
        "best marked, curves, regimes, the distance from the initial weights against log t, and transport maps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    report.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="the folder of a run, or a folder with runs in it at any depth",
    )  # fmt: skip
    report.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page to write")
    report.add_argument("--title", default=argparse.SUPPRESS, help="heading of the page")
    report.add_argument("--open", action="store_true", help="open it in the browser")
    report.add_argument(
        "--target", action="append", default=[], metavar="METRIC>=VALUE",
        help="or METRIC<=VALUE: add what runs took to it; may be given several times",
    )  # fmt: skip
    report.add_argument(
        "--by", default="batch", metavar="NAME", help="the hyper-parameter by which runs are grouped then"
    )
    report.add_argument("--hold", type=at_least(1), default=3, metavar="N", help="points in a row at a target")
    report.add_argument("--smooth", type=at_least(1), default=1, metavar="N", help="the mean of N points counts there")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CommandError("the report draws with matplotlib: pip install 'lightning_gap[plots]'") from None
    from lightning_gap.dashboards.comparison import compare, result_metrics, results_table
    from lightning_gap.dashboards.report import render_html
    from lightning_gap.dashboards.runs import RunError, read_runs
    from lightning_gap.dashboards.targets import Target
    from lightning_gap.trainer.terminal import say

    if options.output.is_dir():
        raise CommandError(f"--output {options.output} is a folder: name a file, as {options.output / 'report.html'}")
    left_out: list[str] = []
    try:
        targets = [Target.parse(text) for text in options.target]
        runs = read_runs(options.runs, left_out=left_out)
        given = {"targets": targets, "by": options.by, "hold": options.hold, "smooth": options.smooth}
        report = compare(runs, title=getattr(options, "title", None), left_out=left_out, **given)
    except (RunError, ValueError) as error:
        raise CommandError(str(error)) from None
    page = render_html(report)
    write_text("--output", options.output, page)
    number = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    say(results_table(runs, result_metrics(runs)[:4]).to_rich(), f"{number}: open {options.output}")
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    if options.open:
        webbrowser.open(options.output.resolve().as_uri())
