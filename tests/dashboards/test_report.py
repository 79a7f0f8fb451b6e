"""The report: one page, self-contained, safe, and valid."""

import base64
import re
from html.parser import HTMLParser

import pytest

from lightning_gap.dashboards import Column, Fact, Figure, Gallery, Report, ResultTable, Row, Section, render_html

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "br", "link", "hr", "input"}


class _Balance(HTMLParser):
    """Every element is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _report(**changes):
    table = ResultTable(
        "Runs", "run", [Column("accuracy", 1, "max", "%")], [Row("a", [[97.0, 98.0]], "why"), Row("b", [90.0])]
    )
    gallery = Gallery([Figure(PNG, "caption", "a dot", "Dot"), Figure("<svg></svg>", alt='say "hi"')], 2)
    fields = {
        "title": "T", "summary": "S", "facts": [Fact("1", "one", "just")],
        "sections": [Section("Chapter", "Lead.", [table, gallery], "Kicker")],
        "configuration": {"Group": {"name": 3}}, "footer": ["Thanks."],
    }  # fmt: skip
    return Report(**(fields | changes))


def test_everything_given_is_shown():
    page = render_html(_report())
    for said in ("T", "S", "Chapter", "Lead.", "Kicker", "97.5", "± 0.7", "90.0", "why", "caption", "Group", "Thanks."):
        assert f">{said}" in page or f" {said}" in page


def test_elements_are_balanced():
    parser = _Balance()
    parser.feed(render_html(_report()))
    assert parser.open == []


def test_nothing_is_fetched():
    page = render_html(_report())
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "url(" not in page
    assert "<script" not in page


def test_the_best_value_alone_is_marked():
    assert render_html(_report()).count('class="best"') == 1


def test_words_are_escaped():
    page = render_html(_report(title="<b>&", summary='"<script>"'))
    assert "<h1>&lt;b&gt;&amp;</h1>" in page
    assert "<script>" not in page
    assert 'aria-label="say &#34;hi&#34;"' in page


def test_light_and_dark_define_the_same_colours():
    page = render_html(_report())
    light, dark = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    names = set(re.findall(r"(--\w+): #", light))
    assert set(re.findall(r"(--\w+): #", dark)) == names
    assert {"--ink", "--paper", "--s0", "--s3"} <= names


def test_a_picture_of_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="PNG or a JPEG"):
        render_html(_report(sections=[Section("C", "L", [Gallery([Figure(b"GIF89a")])])]))


def test_it_is_a_pure_function():
    assert render_html(_report()) == render_html(_report())


def test_an_empty_report_renders():
    assert "<h1>nothing</h1>" in render_html(Report("nothing", "ran"))
