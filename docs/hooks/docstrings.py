"""Docstrings as Markdown: their reStructuredText roles, formulas and tables, before mkdocstrings renders them."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?P<role>attr|class|data|exc|func|meth|mod|math):`(?P<text>[^`]+)`")
_MATH = re.compile(r"^(?P<indent> *)\.\. math::(?P<rest>[^\n]*)\n(?P<body>(?:(?P=indent) +[^\n]*\n|[ ]*\n)*)", re.M)
_EXAMPLE = re.compile(r"^Example:$", re.M)
_RULE = re.compile(r"^ *=+( +=+)+ *$")


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Rewrite the docstrings of ``pkg``."""
        _rewrite(pkg)


def _rewrite(thing: griffe.Object) -> None:
    if thing.docstring is not None:
        thing.docstring.value = markdown(thing.docstring.value, thing)
    for member in thing.members.values():
        if not member.is_alias:
            _rewrite(member)  # type: ignore[arg-type]


def markdown(text: str, scope: griffe.Object | None = None) -> str:
    r"""Return a docstring with Markdown in place of reStructuredText.

    Args:
        text: The docstring, dedented.
        scope: What it belongs to: names are looked up from there.

    Example:
        >>> markdown(":math:`a_1` of :class:`x.Y`")
        '\\(a_1\\) of `Y`'
    """
    text = _MATH.sub(_display, text + "\n").rstrip("\n")
    text = _ROLE.sub(lambda match: _role(match, scope), text)
    text = _EXAMPLE.sub("Examples:", text)  # griffe takes the plural alone for code
    return _tables(text)


def _display(match: re.Match[str]) -> str:
    indent = match["indent"]
    formula = " ".join([match["rest"].strip(), *(line.strip() for line in match["body"].splitlines())]).strip()
    return f"{indent}$$\n{indent}{formula}\n{indent}$$\n\n"


def _role(match: re.Match[str], scope: griffe.Object | None) -> str:
    name = " ".join(match["text"].split())
    if match["role"] == "math":
        return rf"\({name}\)"
    shown = name.lstrip("~.").removesuffix("()").rsplit(".", 1)[-1] if match["role"] != "mod" else name.lstrip("~.")
    path = _path(name.lstrip("~.").removesuffix("()"), scope)
    if path is None:
        return f"`{shown}`"
    return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'


def _path(name: str, scope: griffe.Object | None) -> str | None:
    """Return the path of a name of ours as seen from a docstring, through what its module imports."""
    if scope is None:
        return None
    where: griffe.Object | None = scope
    while where is not None:
        found: Any = where
        for part in name.split("."):
            found = found.members.get(part) if hasattr(found, "members") else None
            if found is None:
                break
            if found.is_alias:
                try:
                    found = found.final_target
                except (griffe.AliasResolutionError, griffe.CyclicAliasError):
                    found = None
                    break
        if found is not None:
            return str(found.canonical_path)
        where = where.parent
    return name if name.startswith("lightning_gap.") else None


def _tables(text: str) -> str:
    """Simple tables, whose columns are ruled by equals signs, as pipe tables."""
    lines, out, at = text.split("\n"), [], 0
    while at < len(lines):
        if not _RULE.match(lines[at]):
            out.append(lines[at])
            at += 1
            continue
        rules = [row for row in range(at, len(lines)) if _RULE.match(lines[row])]
        end = next(row for row in rules[1:] if row + 1 == len(lines) or not lines[row + 1].strip())
        starts = [match.start() for match in re.finditer("=+", lines[at])]
        rows: list[list[str]] = []
        headed = len([row for row in rules if row <= end]) == 3
        for row in range(at + 1, end):
            if row in rules:
                continue
            cells = [lines[row][a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
            if cells[0]:
                rows.append(cells)
            else:
                rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
        rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
        head = rows.pop(0) if headed else [""] * len(starts)
        indent = " " * starts[0]
        out += [f"{indent}| {' | '.join(row)} |" for row in (head, ["---"] * len(starts), *rows)]
        at = end + 1
    return "\n".join(out)
