"""The HTML page with its styles; all text that is not HTML of this package is escaped."""

import base64
import dataclasses
import html
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bqat_jax.report.answers import Unavailable

logger = logging.getLogger(__name__)

# Forbids loading files and running scripts.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# Cells with at most this many characters stay on one line.
SHORT = 26
# The larger side of an image that is embedded, in pixels.
MOST_PIXELS = 96
STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --panel: #f6f7f9; --text: #1b1f24; --soft: #59636e; --grid: #c4cad1;
  --mark: #1b1f24; --warn: #b3401f; --c1: #0068b3; --c2: #c25400; --c3: #00795a; --c4: #a8448a; --c5: #8a6a00;
  --c6: #2790c3; --c7: #6b4fbb; --c8: #5c6570; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --panel: #1d2127; --text: #e6e9ed; --soft: #a3adb8;
  --grid: #4a535d; --mark: #f2f4f7; --warn: #ff9d7a; --c1: #5cb3f2; --c2: #ff9a4d; --c3: #37c79c; --c4: #e58ccb;
  --c5: #dcbc4a; --c6: #8fd4f5; --c7: #b39bf5; --c8: #a3adb8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 12px 20px 48px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6em; line-height: 1.2; margin: 0.6em 0 0.2em; }
h2 { font-size: 1.2em; margin: 2em 0 0.5em; padding-top: 0.5em; border-top: 1px solid var(--grid); }
h3 { font-size: 1em; margin: 1.4em 0 0.4em; }
p, .note { margin: 0.4em 0; max-width: 78ch; }
.note, figcaption, .soft { color: var(--soft); font-size: 0.9em; }
.warn { color: var(--warn); font-weight: 600; }
nav { margin: 0.6em 0; font-size: 0.9em; }
nav a { margin-right: 1em; white-space: nowrap; }
a { color: var(--c1); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(150px, 100%), 1fr)); gap: 8px;
  margin: 0.8em 0; }
.facts div { background: var(--panel); border-radius: 6px; padding: 8px 12px; }
.facts b { display: block; font-size: 1.3em; font-weight: 600; line-height: 1.3; }
.facts span { color: var(--soft); font-size: 0.85em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 16px 20px; }
.grid > figure { min-width: 0; }
figure { margin: 0.5em 0; break-inside: avoid; }
svg.figure { display: block; width: 100%; height: auto; overflow: visible; }
svg.figure text { font-family: inherit; }
svg.figure * { stroke-linejoin: round; stroke-linecap: butt; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 0.85em; margin-top: 2px; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: 0.9em; margin: 0.4em 0; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid);
  overflow-wrap: normal; }
td { max-width: 48ch; overflow-wrap: break-word; }
.short { white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.number { text-align: right; white-space: nowrap; }
th.number, th.short { white-space: normal; }
.wrong { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 12px; }
.wrong img { display: block; width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated;
  background: var(--panel); }
details { margin: 0.5em 0; }
summary { cursor: pointer; color: var(--c1); }
@media (max-width: 480px) { body { padding: 8px 12px 32px; } }
@media print { :root { --page: #ffffff; --panel: #f6f7f9; --text: #000000; --soft: #444444; --grid: #bbbbbb;
  --mark: #000000; --warn: #b3401f; --c1: #0068b3; --c2: #c25400; --c3: #00795a; --c4: #a8448a; --c5: #8a6a00;
  --c6: #2790c3; --c7: #6b4fbb; --c8: #5c6570; }
  body { max-width: none; padding: 0; font-size: 11px; } nav { display: none; } .scroll { overflow: visible; }
  details::details-content { content-visibility: visible; } h2, h3 { break-after: avoid; }
  tr, .wrong > figure { break-inside: avoid; } }
"""


class Html(str):
    """Text that is HTML; all other text is escaped."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure with its legend and caption.

    Attributes:
        svg: the figure, an SVG element.
        legend: names of its lines, in the order of the page's colours.
        caption: a sentence.
    """

    svg: str
    legend: tuple[str, ...] = ()
    caption: str = ''


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page under a heading.

    Attributes:
        title: the heading.
        body: its content.
    """

    title: str
    body: Html


def escaped(value: Any) -> str:
    """Returns a value as HTML text without characters that are not printable."""
    if isinstance(value, Html):
        return value
    return html.escape(''.join(c for c in str(value) if c.isprintable() or c in '\n\t'), quote=True)


def element(tag: str, *content: Any, **attributes: str) -> Html:
    """Returns an element; content and attributes are escaped, `class_` is `class`."""
    given = ''.join(f' {name.rstrip("_")}="{escaped(value)}"' for name, value in attributes.items() if value)
    return Html(f'<{tag}{given}>{"".join(map(escaped, content))}</{tag}>')


def joined(parts: Iterable[Html]) -> Html:
    """Concatenates parts."""
    return Html('\n'.join(parts))


def note(*text: Any) -> Html:
    """Returns a paragraph in a softer colour."""
    return element('p', *text, class_='note')


def warning(*text: Any) -> Html:
    """Returns an emphasised paragraph."""
    return element('p', *text, class_='warn')


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: Iterable[str] = ()) -> Html:
    """Returns a table, which scrolls if it is wider than the page.

    Args:
        header: names of the columns.
        rows: rows of cells.
        numbers: names of the right-aligned columns.
    """
    right = {header.index(name) for name in numbers}

    def class_of(place, cell):
        return 'number' if place in right else 'short' if len(str(cell)) <= SHORT else ''

    def row(tag, cells):
        assert len(cells) == len(header)
        return element('tr', *(element(tag, cell, class_=class_of(place, cell)) for place, cell in enumerate(cells)))

    body = element(
        'table', element('thead', row('th', header)), element('tbody', *(row('td', cells) for cells in rows))
    )
    return element('div', body, class_='scroll', tabindex='0')


def facts(values: Iterable[tuple[str, str]]) -> Html:
    """Returns values in large type, each above its name; `values` are pairs of name and value."""
    return element('div', *(element('div', element('b', v), element('span', k)) for k, v in values), class_='facts')


def figure(drawing: Drawing) -> Html:
    """Returns a figure with its legend and its caption."""
    swatches = [
        element('span', element('i', style=f'background: var(--c{number})'), name)
        for number, name in enumerate(drawing.legend, 1)
    ]
    parts = [Html(drawing.svg)]
    if swatches:
        parts.append(element('div', *swatches, class_='legend'))
    if drawing.caption:
        parts.append(element('figcaption', drawing.caption))
    return element('figure', *parts)


def grid(drawings: Iterable[Drawing]) -> Html:
    """Returns figures in a grid that adapts to the page's width."""
    return element('div', *map(figure, drawings), class_='grid')


def folded(summary: str, *content: Any) -> Html:
    """Returns content that is shown in print, and on screen after a click on the summary."""
    return element('details', element('summary', summary), *content)


def image(pixels: np.ndarray, alternative: str) -> Html:
    """Returns an image as a PNG within the page, at most `MOST_PIXELS` high and wide.

    Args:
        pixels: (height, width, channels), uint8 from 0 to 255 or float from 0 to 1; only the first channel is shown
            unless there are three.
        alternative: the alternative text.
    """
    from PIL import Image

    if pixels.dtype != np.uint8:
        pixels = np.rint(255 * np.clip(np.nan_to_num(pixels.astype(np.float32)), 0, 1)).astype(np.uint8)
    picture = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
    picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, format='PNG', optimize=True)
    source = f'data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'
    return Html(f'<img src="{source}" alt="{escaped(alternative)}">')


def section(title: str, make: Callable[[], Iterable[Html]]) -> Section:
    """Returns a section; if its content cannot be made, it holds the reason.

    Args:
        title: its heading.
        make: returns its content; may raise `Unavailable`, or any other exception.
    """
    return Section(title, part(make))


def part(make: Callable[[], Iterable[Html]]) -> Html:
    """Returns the result of `make`, or the reason why it cannot be made."""
    try:
        return joined(make())
    except Unavailable as error:
        return note(str(error))
    except Exception as error:  # the other parts are still shown
        logger.debug('A part of the report could not be made.', exc_info=True)
        return warning(f'This part could not be made: {type(error).__name__}: {str(error).partition(chr(10))[0][:300]}')


def page(title: str, lead: Html, sections: Sequence[Section]) -> str:
    """Returns the page.

    Args:
        title: its heading.
        lead: content before the sections.
        sections: its sections.
    """
    links = [element('a', one.title, href=f'#s{number}') for number, one in enumerate(sections, 1)]
    bodies = [
        element('section', element('h2', one.title, id=f's{number}'), one.body)
        for number, one in enumerate(sections, 1)
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'{element("title", title)}\n<style>{STYLE}</style>\n</head>\n<body>\n'
    )
    content = joined([element('h1', title), lead, element('nav', *links), *bodies])
    return f'{head}{content}\n</body>\n</html>\n'
