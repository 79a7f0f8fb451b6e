"""Check a built site without a network: internal links and anchors lead somewhere, and nothing loads from elsewhere.

``python docs/hooks/links.py site`` lists what is wrong, and exits with 1 where anything is.
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes by which a browser loads something without being asked.
_LOADS = {("script", "src"), ("img", "src"), ("iframe", "src"), ("link", "href"), ("source", "src")}


class _Page(HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif (tag, name) in _LOADS:
                self.loads.append(value)
            elif name == "href":
                self.links.append(value)


def check(site: Path) -> list[str]:
    """Return what is wrong with the pages under ``site``, one line each."""
    pages = {path.resolve(): _Page(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site}: no pages"]
    wrong = []
    for path, page in pages.items():
        where = path.relative_to(site.resolve())
        if path.name == "404.html":  # served in the place of any page, so its links are from the root
            continue
        wrong += [f"{where}: loads {url} from elsewhere" for url in page.loads if urlsplit(url).netloc]
        for url in page.links + [url for url in page.loads if not urlsplit(url).netloc]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                wrong.append(f"{where}: {url} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                wrong.append(f"{where}: {url} has no such anchor")
    return wrong


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    print("\n".join(found) or "Every link leads somewhere.")
    sys.exit(bool(found))
