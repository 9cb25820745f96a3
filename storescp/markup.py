"""HTML and SVG as text, escaped by construction: what is no ``Markup`` is text, whatever it says."""

from __future__ import annotations

from html import escape as _escape

from storescp.log import escape


class Markup(str):
    """Markup that was made here."""

    __slots__ = ()


def element(tag: str, /, *content: str | Markup, **attributes: str | float) -> Markup:
    r"""Return an element with its content; one without any closes itself. It is HTML and XML at once.

    Args:
        tag: Its name.
        content: Markup as it is; other text is escaped, control characters told as ``\x1b``.
        attributes: A trailing or inner ``_`` stands for what Python does not allow: ``class_``, ``aria_label``.
    """
    said = "".join(f' {key.strip("_").replace("_", "-")}="{_text(_number(v))}"' for key, v in attributes.items())
    inner = "".join(part if isinstance(part, Markup) else _text(part) for part in content)
    return Markup(f"<{tag}{said}>{inner}</{tag}>" if content else f"<{tag}{said}/>")


def join(parts: list[Markup]) -> Markup:
    """Return markup after markup."""
    return Markup("\n".join(parts))


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def _text(text: str) -> str:
    return _escape(escape(text), quote=True)
