"""What stands in an HTML page, for tests to look at."""

from __future__ import annotations

from html.parser import HTMLParser


class Document(HTMLParser):
    """Tags and attributes in order; for each section its heading, text, table rows and marks."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[str]]] = []
        self.links: list[str] = []
        self.styles: list[str] = []
        self.ids: list[str] = []
        self.sections: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.trained: list[str] = []
        self.articles: dict[str, str] = {}
        self._open: list[tuple[str, str]] = []
        self._heading = ""
        self._article = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, [name for name, _ in attrs]))
        if tag not in ("meta", "br", "img", "path", "use", "rect", "link"):
            self._open.append((tag, values.get("class", "")))
        for name, found in (("id", self.ids), ("href", self.links), ("style", self.styles)):
            if name in values:
                found.append(values[name])
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag == "mark" and values.get("class") == "trained":
            self.trained.append("")
        if tag == "article":
            self._article = values.get("id", "").removeprefix("check-")
            self.articles.setdefault(self._article, self._heading)
        if tag == "h2":
            self._heading = ""

    def handle_endtag(self, tag: str) -> None:
        if any(name == tag for name, _ in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self._open]
        if inside and inside[-1] == "h2":
            self._heading += data
            return
        if self._heading:
            self.sections[self._heading] = self.sections.get(self._heading, "") + data
        if "td" in inside and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data
        if ("mark", "trained") in self._open and "pre" in inside:
            self.trained[-1] += data
