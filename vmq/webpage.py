"""Pieces of pages that open offline: the page itself, tables, charts, pictures, text."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vmq.report import said

Picture = NDArray[np.uint8]
"""[H,W,3] RGB or [H,W]."""

STRIP = 6
"""Width of a frame in a flicker strip, in pixels."""
DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 4", "5 5")


def page(title: str, head: str, sections: Sequence[tuple[str, str, str]], data: str = "") -> str:
    """A whole page: what stands on top, then sections as (id, title, content)."""
    style, script = ((files("vmq") / "page" / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    links = "".join(f'<li><a href="#{i}">{esc(t)}</a></li>' for i, t, _ in sections)
    body = "\n".join(f'<section aria-labelledby="{i}"><h2 id="{i}">{esc(t)}</h2>\n{c}\n</section>'
                     for i, t, c in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{esc(title)}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#{sections[0][0] if sections else 'answer'}">Skip to the details</a>
<header>
{head}
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{body}
</main>
<footer><p>Made by <code>vmq inspect</code>. One file: it opens offline and sends nothing anywhere.</p></footer>
{data}
<script>
{script}</script>
</body>
</html>
"""


def chart(series: Sequence[tuple[str, Sequence[float]]], first: int = 0) -> str:
    """Lines over frames, as SVG with a legend; `first` is the first line's colour."""
    width, height, left, bottom = 900, 320, 62, 40
    count = len(series[0][1])
    top = max(max(s) for _, s in series) or 1.0
    step = _round_step(top / 4)
    ticks = np.arange(0.0, top + step, step)

    def x(t: float) -> float:
        return left + (width - left - 12) * t / max(1, count - 1)

    def y(v: float) -> float:
        return 12 + (height - bottom - 12) * (1 - v / float(ticks[-1]))

    parts = [f'<path class="axis" d="M{left} {y(v):.1f}H{width - 12}"/><text x="{left - 8}" y="{y(v) + 5:.1f}" '
             f'text-anchor="end">{v:g}</text>' for v in ticks]
    parts += [f'<text x="{x(t):.1f}" y="{height - 14}" text-anchor="middle">{t}</text>'
              for t in range(0, count, max(1, count // 8))]
    legend = []
    for index, (name, values) in reversed(list(enumerate(series, first))):
        style = f'style="stroke:var(--s{min(index, 5)})" stroke-dasharray="{DASHES[min(index, 5)]}"'
        points = " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in enumerate(values))
        parts.append(f'<polyline class="series" {style} points="{points}"/>')
        sample = f'<svg viewBox="0 0 32 12" aria-hidden="true"><path class="series" {style} d="M0 6H32"/></svg>'
        legend.append(f"<li>{sample}{esc(name)}: mean {np.mean(values):.2f}</li>")
    return (f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="Alpha error over {count} '
            f'frames">{"".join(parts)}</svg><ul class="legend">{"".join(legend[::-1])}</ul>')


def listing(pairs: Iterable[tuple[str, Any]]) -> str:
    """Names and values as a table of two columns."""
    rows = "".join(f'<tr><th scope="row">{esc(k)}</th><td>{esc(said(v))}</td></tr>' for k, v in pairs)
    return scroll("Values", f"<table><tbody>{rows}</tbody></table>")


def sortable(heads: Sequence[tuple[str, bool | None]], rows: Sequence[str], attributes: str = "") -> str:
    """A sortable table; a head is (text, whether it holds numbers, None where there is nothing to sort by)."""
    cells = []
    for text, numbers in heads:
        kind = ' class="n" data-first="down"' if numbers else ""
        inner = esc(text) if numbers is None else f'<button type="button">{esc(text)}</button>'
        cells.append(f'<th scope="col"{kind}>{inner}</th>')
    return (f'<table {attributes} data-sortable><thead><tr>{"".join(cells)}</tr></thead>'
            f'<tbody>{"".join(rows)}</tbody></table>')


def cell(value: float | None, digits: int = 0, *, percent: bool = False) -> str:
    """A number as a cell of a sortable table; None is empty."""
    if value is None:
        return '<td class="n" data-v=""></td>'
    shown = f"{value:.{digits}%}" if percent else f"{value:.{digits}f}"
    if digits == 1 and not percent and value > 99:            # decibels of what is all but exact
        shown = "≥ 99"
    return f'<td class="n" data-v="{value:.6g}">{shown}</td>'


def scroll(name: str, table: str, *, tall: bool = False) -> str:
    """A region that scrolls on its own, with keys as well."""
    kind = "scroll tall" if tall else "scroll"
    return f'<div class="{kind}" role="region" aria-label="{esc(name)}" tabindex="0">{table}</div>'


def figure(title: str, text: str, source: str) -> str:
    """A picture, as `png` or `jpeg` make it, with its caption."""
    caption = f"<b>{esc(title)}</b>{'. ' + esc(text) if text else ''}"
    return f'<figure><img src="{source}" alt="{esc(title)}" loading="lazy"><figcaption>{caption}</figcaption></figure>'


def grey(alpha: NDArray[np.float32]) -> Picture:
    """Alpha [H,W] in 0..1 as a grey picture."""
    return np.rint(alpha * 255.0).astype(np.uint8)


def wide(picture: Picture) -> Picture:
    """[H,T] or [H,T,3] with every frame `STRIP` pixels wide."""
    return np.repeat(picture, STRIP, axis=1)


def red_and_blue(off: NDArray[np.float32], gain: float) -> Picture:
    """White where there is none, red above 0, blue below."""
    strength = np.clip(np.abs(off) * gain, 0.0, 1.0)[..., None]
    colour = np.where(off[..., None] > 0, np.array([190, 30, 30]), np.array([20, 80, 190]))
    return np.rint(255.0 * (1.0 - strength) + colour * strength).astype(np.uint8)


def png(picture: Picture) -> str:
    """The picture within the page, exact."""
    return _data(picture, ".png", "image/png", [cv2.IMWRITE_PNG_COMPRESSION, 9])


def jpeg(picture: Picture) -> str:
    """The picture within the page, smaller."""
    return _data(picture, ".jpg", "image/jpeg", [cv2.IMWRITE_JPEG_QUALITY, 85])


def _data(picture: Picture, kind: str, mime: str, how: list[int]) -> str:
    bgr = np.ascontiguousarray(picture[..., ::-1] if picture.ndim == 3 else picture)
    _, content = cv2.imencode(kind, bgr, how)
    return f"data:{mime};base64,{base64.b64encode(content.tobytes()).decode()}"


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** np.floor(np.log10(max(rough, 1e-12)))
    return float(next(n * power for n in (1.0, 2.0, 5.0, 10.0) if n * power >= rough * 0.999))


def prose(text: str) -> str:
    """Text in which what stands between backticks is code."""
    return "".join(f"<code>{esc(part)}</code>" if i % 2 else esc(part) for i, part in enumerate(text.split("`")))


def esc(text: object) -> str:
    """Anything as text of a page."""
    return escape(str(text), quote=True)
