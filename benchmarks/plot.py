"""The plot: objects per second of every server in every case, as horizontal bars, tuned DCMTK = 1. SVG, by hand."""

from __future__ import annotations

from xml.sax.saxutils import escape

from benchmarks.result import Result

_COLOURS = {
    "dcmtk": "#8c96a3",
    "dcmtk-shipped": "#c3c9d0",
    "orthanc": "#d08a3e",
    "pynetdicom": "#b9a25a",
    "strongroom": "#2f6f9f",
    "strongroom-one": "#8fb8d3",
}
_CASES = ("ct1", "ct4", "small1", "small4", "large")
_WIDTH, _LEFT, _BAR, _ROW, _TITLE = 860, 190, 16, 21, 30
_SPAN = 460


def svg(result: Result) -> str:
    """Return the plot as SVG text."""
    groups = [g for g in result.groups() if g[1] in _CASES]
    longest = max((_ratio(result, *g, s) for g in groups for s in _servers(result, *g)), default=1.0)
    body: list[str] = []
    y = 34
    for disk, case in groups:
        where = ", journaled image" if disk == "journal" else ""
        body.append(_text(10, y + 14, result.raw["cases"][case] + where, weight="600"))
        y += _TITLE - 6
        for server in _servers(result, disk, case):
            ratio = _ratio(result, disk, case, server)
            row = result.rows[disk, case, server]
            length = max(1.0, ratio / longest * _SPAN)
            rate = f"{row.mb:,.0f} MB/s" if case == "large" else f"{row.rate:,.0f}/s"
            body.append(_text(_LEFT - 8, y + 12, result.title(server), anchor="end"))
            body.append(
                f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="2" fill="{_COLOURS[server]}"/>'
            )
            body.append(_text(_LEFT + length + 6, y + 12, f"{ratio:.2f} ({rate})"))
            y += _ROW
        y += 10
    one = _LEFT + _SPAN / longest
    line = f'<line x1="{one:.1f}" x2="{one:.1f}" y1="34" y2="{y}" stroke="#444" stroke-dasharray="3 3"/>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 8}" width="{_WIDTH}" height="{y + 8}" '
        'font-family="sans-serif" font-size="12" role="img">'
    )
    title = "<title>Objects per second over TLS, tuned DCMTK storescp = 1</title>"
    ground = f'<rect width="{_WIDTH}" height="{y + 8}" fill="#fff"/>'
    top = _text(10, 20, "Objects per second over TLS; tuned DCMTK storescp = 1 (higher is faster)", weight="600")
    return "\n".join([head, title, ground, top, *body, line, "</svg>", ""])


def _servers(result: Result, disk: str, case: str) -> list[str]:
    return [server for server in result.servers(disk, case) if server in _COLOURS]


def _ratio(result: Result, disk: str, case: str, server: str) -> float:
    return result.value(disk, case, "rate", server, "dcmtk") or 0.0


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" fill="#222">{escape(text)}</text>'
