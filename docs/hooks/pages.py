"""MkDocs hooks: formulas become MathML when the site is built, so that no script is needed to read them."""

import html
import logging
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

# MkDocs counts warnings below its own logger, and a strict build fails for any.
_log = logging.getLogger("mkdocs.hooks.pages")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)

# Output with a table that is drawn of characters, whose lines must stay whole.
_DRAWN = re.compile(r'<div class="language-text highlight">(?=(?:(?!</div>).)*[│┃])', re.S)
# Names of functions that take their argument without brackets, and are not the base of a script.
_FUNCTION = re.compile(
    r"(?<!<msub>)(?<!<msup>)(?<!<msubsup>)(?<!<munder>)(<m([io])>(?:arccos|cos|det|erf|exp|log|sin|tr)</m\2>)"
    r'(?!<mo stretchy="false">&#x00028;)(?!</)'
)
_SPACE = '<mspace width="0.167em"></mspace>'
# Characters of LaTeX beyond which a formula in a line may be wider than a telephone.
_LONG = 30


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Name the files of the repository that a page links to, and the site does not hold."""
    docs = Path(config.docs_dir).resolve()

    def named(match: re.Match[str]) -> str:
        target = (Path(page.file.abs_src_path).parent / match[2]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return match[0]
        return f"{match[1]} (`{target.relative_to(docs.parent)}`)"

    return _LINK.sub(named, markdown)


def on_page_content(content: str, page: Any, **kwargs: Any) -> str:
    """Replace the page's formulas, warn of those that are not understood, and mark tables drawn of characters."""

    def mathml(match: re.Match[str]) -> str:
        latex = html.unescape(match[3]).strip()
        made = convert(latex, display="inline" if match[2] == "(" else "block")
        made = _FUNCTION.sub(rf"{_SPACE}\1{_SPACE}", made)
        if "\\" in made:
            _log.warning("%s: this formula is not understood: %s", page.file.src_path, latex)
        if match[2] == "[":
            return f'<div class="formula">{made}</div>'
        return f'<span class="long-formula">{made}</span>' if len(latex) > _LONG else made

    return _DRAWN.sub('<div class="language-text drawn highlight">', _FORMULA.sub(mathml, content))


def on_config(config: Any, **kwargs: Any) -> Any:
    """Leave out the entries of the navigation that have no page."""
    config.nav = _existing(config.nav, Path(config.docs_dir))
    return config


def _existing(entries: list[Any], docs: Path) -> list[Any]:
    kept: list[Any] = []
    for entry in entries:
        ((title, value),) = entry.items()
        if isinstance(value, list):
            kept.append({title: _existing(value, docs)})
        elif (docs / value).exists():
            kept.append(entry)
    return kept
