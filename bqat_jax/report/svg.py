"""Matplotlib figures as inline SVG with the page's colours and fonts.

Colours of a figure are placeholders that become the page's CSS variables, so that one figure suits light and dark
pages. Matplotlib is imported when something is drawn, without pyplot.
"""

import html
import io
import re
import warnings
from typing import Any

# Colours that figures are drawn with, and the page's variables for them.
TEXT, GRID, MARK = '#010203', '#040506', '#070809'
LINES = tuple(f'#0a0b{number:02x}' for number in range(1, 9))
VARIABLES = {
    TEXT: 'var(--text)',
    GRID: 'var(--grid)',
    MARK: 'var(--mark)',
    **{color: f'var(--c{number})' for number, color in enumerate(LINES, 1)},
}
# Size of text in a figure, in CSS pixels.
FONT_SIZE = 11
# A figure of 72 dots per inch has one dot per point, and SVG treats points as pixels.
DPI = 72
SETTINGS = {
    'axes.edgecolor': GRID,
    'axes.labelcolor': TEXT,
    'axes.spines.right': False,
    'axes.spines.top': False,
    'axes.titlecolor': TEXT,
    'axes.titlesize': FONT_SIZE,
    'axes.titlelocation': 'left',
    'axes.labelsize': FONT_SIZE,
    'axes.linewidth': 1.0,
    'font.family': ['DejaVu Sans'],
    'font.size': FONT_SIZE,
    'grid.color': GRID,
    'grid.linewidth': 0.6,
    'hatch.color': GRID,
    'svg.fonttype': 'none',
    'text.color': TEXT,
    'text.parse_math': False,
    'xtick.color': GRID,
    'xtick.labelcolor': TEXT,
    'xtick.labelsize': FONT_SIZE,
    'ytick.color': GRID,
    'ytick.labelcolor': TEXT,
    'ytick.labelsize': FONT_SIZE,
    'path.simplify_threshold': 0.5,
}


def draw(name: str, size: tuple[float, float], paint: Any, *, title: str = '', is_laid_out: bool = False) -> str:
    """Returns a figure as an SVG element; the result is deterministic.

    Args:
        name: name of the figure, unique on a page.
        size: width and height in CSS pixels.
        paint: draws into a `matplotlib.figure.Figure`, in the colours of this module.
        title: title for screen readers.
        is_laid_out: whether `paint` positions the axes; otherwise they are fitted around their labels, which takes
            longer.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {**SETTINGS, 'svg.hashsalt': name}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # glyphs that Matplotlib's font lacks; browsers have other fonts
        figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI, layout=None if is_laid_out else 'constrained')
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format='svg', transparent=True, metadata=dict.fromkeys(('Creator', 'Date'), None))
        figure.clear()  # else its arrays wait for a full garbage collection, which a large heap makes rare
    return _embed(buffer.getvalue(), name, size, title)


# Precedes a reference to another element.
REFERENCE = r'(?:url\(|href=")#'


def _rounded(tag: re.Match[str]) -> str:
    """A tag with its numbers rounded to hundredths of a pixel."""
    return re.sub(r'-?\d+\.\d{3,}', lambda number: f'{round(float(number[0]), 2):g}', tag[0])


def _embed(text: str, name: str, size: tuple[float, float], title: str) -> str:
    """The SVG element of a file, with unique names and the page's colours."""
    text = text[text.index('<svg') :].strip()
    text = re.sub(r'<metadata>.*?</metadata>\s*', '', text, flags=re.S)
    text = re.sub(r'<!--.*?-->\s*', '', text, flags=re.S)
    text = re.sub(r'<defs>\s*<style.*?</style>\s*</defs>\s*', '', text, flags=re.S)
    # Text uses the page's font, and keeps its size and position.
    text = re.sub(r'font: ([0-9.]+px) [^;\"]*', r'font-size: \1', text)
    text = re.sub(r' font-family: [^;\"]*;', '', text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', '', text)
    text = re.sub(r'<[^>]*>', _rounded, text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    used = set(re.findall(f'{REFERENCE}([\\w.-]+)', text))
    prefix = re.sub(r'[^a-z0-9]+', '-', name.lower())

    def rename(match):
        return f' id="{prefix}-{match[1]}"' if match[1] in used else ''

    text = re.sub(r' id="([^"]*)"', rename, text)
    text = re.sub(REFERENCE, lambda match: f'{match[0]}{prefix}-', text)
    text = text.replace('xlink:href', 'href')
    text = re.sub(r'\s*\n\s*', ' ', text).replace('> <', '><')
    label = html.escape(title, quote=True)
    head = (
        f'<svg class="figure" role="img" aria-label="{label}" viewBox="0 0 {size[0]:g} {size[1]:g}" '
        f'style="max-width: {size[0]:g}px">'
    )
    return head + text[text.index('>') + 1 :]
