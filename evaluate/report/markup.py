"""HTML built from elements, so that text is escaped everywhere and nothing has to remember to."""

from __future__ import annotations

import html

VOID = frozenset({"br", "meta", "link", "input", "hr", "img", "col"})


class Html(str):
    """Markup that is already safe. Only `h`, `join` and `trusted` make it."""

    __slots__ = ()


Child = str | Html | int | None


def trusted(markup: str) -> Html:
    """Markup of our own making (an asset, a drawn SVG), taken as it is. Never call it on text from data."""
    return Html(markup)


def h(tag: str, *children: Child, **attributes: str | bool | None) -> Html:
    """One element. Children that are not Html are escaped as text; None is left out.

    Attribute names lose a trailing underscore and other underscores become hyphens; True is a bare attribute, False and
    None leave it out. Text that came from a corpus or a config belongs in `text`.
    """
    written = "".join(attribute(name, value) for name, value in attributes.items() if value not in (None, False))
    if tag in VOID:
        return Html(f"<{tag}{written}>")
    return Html(f"<{tag}{written}>{join(*children)}</{tag}>")


def attribute(name: str, value: str | bool | None) -> str:
    """One attribute with a leading space."""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value), quote=True)}"'


def join(*children: Child) -> Html:
    """Children after one another, text escaped."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None))


def text(value: object) -> Html:
    """Foreign text (a path, a name, a corpus) isolated, so that its direction cannot reorder what is around it."""
    return h("bdi", str(value))
