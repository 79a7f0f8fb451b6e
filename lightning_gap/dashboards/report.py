"""A report as one self-contained HTML page: data in, text out."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lightning_gap.dashboards.figures import SERIES
from lightning_gap.dashboards.table import ResultTable

__all__ = ["Fact", "Figure", "Gallery", "Legend", "Report", "Section", "render_html"]


@dataclass(frozen=True)
class Fact:
    """One number a reader should leave with.

    Args:
        value: The number, written out.
        label: What it is, in a few words.
        detail: How it came about, in one short sentence.
    """

    value: str
    label: str
    detail: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture with a caption that says what one sees.

    Args:
        content: SVG markup, or the bytes of a PNG or JPEG file.
        caption: One or two sentences.
        alt: What the picture shows, for those who do not see it.
        title: Short heading over the picture.
    """

    content: str | bytes
    caption: str = ""
    alt: str = ""
    title: str = ""

    @property
    def markup(self) -> Markup:
        """The picture as HTML: SVG as it is, other formats as a data URL.

        Raises:
            ValueError: If the bytes are neither PNG nor JPEG.
        """
        if isinstance(self.content, str):
            label = Markup('<div class="svg" role="img" aria-label="{}">').format(self.alt)
            return label + Markup(self.content) + Markup("</div>")
        kinds = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}
        kind = next((kind for magic, kind in kinds.items() if self.content.startswith(magic)), None)
        if kind is None:
            raise ValueError("Figure.content: bytes must be a PNG or a JPEG file; give SVG as a string")
        data = base64.b64encode(self.content).decode()
        return Markup('<img alt="{}" src="data:{};base64,{}">').format(self.alt, kind, data)


@dataclass(frozen=True)
class Gallery:
    """Figures side by side where the window is wide enough.

    Args:
        figures: The figures, in reading order.
        columns: How many side by side in a wide window; on a phone two of four, else one.
    """

    figures: Sequence[Figure]
    columns: Literal[1, 2, 3, 4] = 2


@dataclass(frozen=True)
class Legend:
    """Names beside the colours and dashes that :func:`lightning_gap.dashboards.figures.overlay` gives its lines.

    Args:
        title: What the entries are.
        entries: Their names.
        styles: For each the number of its line.
    """

    title: str
    entries: Sequence[str]
    styles: Sequence[int]

    @property
    def lines(self) -> list[tuple[str, int, str]]:
        """Each name with the number of its colour and the SVG dashes of its line, empty if it is drawn through."""
        dashes = ("", "8 4", "4 4")
        return [
            (entry, style % len(SERIES), dashes[style // len(SERIES) % len(dashes)])
            for entry, style in zip(self.entries, self.styles, strict=True)
        ]


@dataclass(frozen=True)
class Section:
    """A chapter of a report.

    Args:
        title: Heading.
        lead: Opening sentences: the question, and the answer the numbers give.
        blocks: Tables, galleries and legends in reading order.
        kicker: Small line over the heading, for example the paper.
    """

    title: str
    lead: str
    blocks: Sequence[ResultTable | Gallery | Legend]
    kicker: str = ""


@dataclass(frozen=True)
class Report:
    """All that a report says.

    Args:
        title: Heading of the page.
        summary: Opening sentences.
        facts: The few numbers to leave with.
        sections: The chapters.
        configuration: Groups of settings, each a mapping from a name to a value.
        footer: Attributions and the like, one sentence an entry.
    """

    title: str
    summary: str
    facts: Sequence[Fact] = ()
    sections: Sequence[Section] = ()
    configuration: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    footer: Sequence[str] = ()


def render_html(report: Report) -> str:
    """Return the report as one HTML page that needs no network and follows the reader's light or dark theme.

    Args:
        report: What to say.

    Example:
        >>> page = render_html(Report("Runs & results", "Nothing ran."))
        >>> "<h1>Runs &amp; results</h1>" in page
        True
    """
    source = files("lightning_gap.dashboards").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(report=report)
