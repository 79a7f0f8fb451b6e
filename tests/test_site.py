"""What makes the site: docstrings as Markdown, formulas as MathML, links that lead somewhere."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("griffe")
pytest.importorskip("latex2mathml")
sys.path.append(str(Path(__file__).parents[1] / "docs" / "hooks"))

import docstrings
import links
import pages


def test_roles_and_formulas_become_markdown():
    text = "Of :math:`a_1`, by :class:`~x.Y` and :func:`f`.\n\n.. math::\n    a = b,\n    c\n\nAfter.\n\n"
    text += "Example:\n    >>> 1\n    1"
    assert docstrings.markdown(text) == (
        "Of \\(a_1\\), by `Y` and `f`.\n\n$$\na = b, c\n$$\n\nAfter.\n\nExamples:\n    >>> 1\n    1"
    )


def test_simple_tables_become_pipe_tables():
    text = "==== =======\n``a`` one\n     more\n``b`` x | y\n==== =======\n\nAfter."
    text = text.replace("==== =======", "===== =======").replace("     more", "      more")
    expected = "|  |  |\n| --- | --- |\n| ``a`` | one more |\n| ``b`` | x \\| y |\n\nAfter."
    assert docstrings.markdown(text) == expected


def test_formulas_become_mathml_and_unknown_ones_a_warning(caplog):
    page = SimpleNamespace(file=SimpleNamespace(src_path="page.md"))
    made = pages.on_page_content(r'<span class="arithmatex">\(a &lt; \beta\)</span>', page)
    assert made.startswith("<math")
    assert "&#x003B2;" in made
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        pages.on_page_content(r'<div class="arithmatex">\[\nonsense\]</div>', page)
    assert "page.md: this formula is not understood" in caplog.text


def test_functions_stand_apart_and_long_formulas_scroll():
    page = SimpleNamespace(file=SimpleNamespace(src_path="page.md"))

    def made(latex):
        return pages.on_page_content(rf'<span class="arithmatex">\({latex}\)</span>', page)

    assert made(r"b \log t").count("<mspace") == 2
    assert "<mspace" not in made(r"\cos(t)")
    assert "<mspace" not in made(r"\log_2 t")
    assert made("a").startswith("<math")
    assert made(" + ".join("abcdefghijk")).startswith('<span class="long-formula"><math')


def test_tables_drawn_of_characters_are_marked():
    page = SimpleNamespace(file=SimpleNamespace(src_path="page.md"))
    block = '<div class="language-text highlight"><pre>{}</pre></div>'
    made = pages.on_page_content(block.format("a") + block.format("│ b │"), page)
    assert made == block.format("a") + block.format("│ b │").replace("text", "text drawn")


def test_what_is_wrong_with_a_site_is_listed(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="b.html#there">.</a><a href="#top">.</a><a href="https://example.org/x">.</a>'
    )
    (tmp_path / "b.html").write_text('<p id="there">B</p>')
    assert links.check(tmp_path) == []
    (tmp_path / "b.html").write_text('<p id="here">B</p><a href="c.html">.</a><img src="https://example.org/i.png">')
    assert links.check(tmp_path) == [
        "a.html: b.html#there has no such anchor",
        "b.html: loads https://example.org/i.png from elsewhere",
        "b.html: c.html leads nowhere",
    ]
