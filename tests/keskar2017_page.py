"""The report's page, read as a browser would: elements, tables as text, what it links to."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str) -> list[Element]:
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] * (child.tag == tag) + child.all(tag)
        return found


class Page(HTMLParser):
    """Raises an AssertionError where an element is closed that is not the innermost open one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("document", {})
        self._open = [self.root]
        self.declaration = ""
        self.feed(text)
        self.close()
        assert self._open == [self.root], f"never closed: {[element.tag for element in self._open[1:]]}"

    def handle_decl(self, decl):
        self.declaration = decl

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs})
        assert len(element.attributes) == len(attrs), f"an attribute of {tag} is given twice"
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self._open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data):
        self._open[-1].children.append(data)

    def elements(self, tag: str) -> list[Element]:
        return self.root.all(tag)

    def every(self) -> list[Element]:
        def walk(element):
            for child in element.children:
                if isinstance(child, Element):
                    yield child
                    yield from walk(child)

        return list(walk(self.root))

    def table(self, name: str) -> list[list[str]]:
        """Header and rows as text."""
        (found,) = [table for table in self.elements("table") if table.attributes.get("id") == f"table-{name}"]
        return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in found.all("tr")]
