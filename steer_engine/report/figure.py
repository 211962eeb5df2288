"""One figure of a report, and the style that all of them share.

A figure is drawn by matplotlib and stands in the page as SVG. Its text stays text, in the page's
own font; its house colours become CSS variables, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from xml.sax.saxutils import quoteattr

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

# Inches. So wide a drawing can be read on a phone; a wider one scrolls there in its own container.
WIDTH = 5.0

# Colours to draw with. In the page each becomes the variable below and follows the colour scheme;
# any other colour (a colour map's) stays as it is, so text on top of one needs a fixed colour too.
INK, MUTED, GRID = "#1c1b1a", "#6b6864", "#dcd8d2"
# Told apart by people with any common colour vision: Okabe and Ito 2008.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c564b", "#7a7974")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES, start=1)
}

_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a run's name may hold a dollar sign
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
}


@dataclass(frozen=True)
class Cell:
    """What opens when a cell of a figure is chosen. label: what the cell stands for."""

    label: str
    examples: list[str]


@dataclass(frozen=True)
class Figure:
    """A drawing with what the page says about it.

    name: letters, digits and hyphens; one of its kind in a page.
    svg: from to_svg.
    cells: the element with the gid cell_id(name, i) opens cells[i].
    """

    name: str
    title: str
    caption: str
    svg: str
    cells: list[Cell] = field(default_factory=list)


def cell_id(figure_name: str, index: int) -> str:
    """The gid of the element of a drawing that opens cells[index] (artist.set_gid)."""
    return f"cell-{figure_name}-{index}"


@contextmanager
def house_style() -> Iterator[None]:
    """Fonts, colours and spines of every figure; draw inside it, without pyplot:

    with house_style():
        drawing = matplotlib.figure.Figure(figsize=(WIDTH, 3), layout="constrained")
    """
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def to_svg(drawing: Drawing, name: str, description: str) -> str:
    """A drawing as an svg element that can stand in a page beside others.

    The same drawing gives the same bytes. description: what a screen reader says in its place.
    """
    import matplotlib

    buffer = io.StringIO()
    # Without a date, and with ids that hang on the name instead of on chance.
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(_RC | {"svg.hashsalt": name}), warnings.catch_warnings():
        # Its own font measures the text; the page's font, which writes it, has more glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        drawing.savefig(buffer, format="svg", metadata=metadata)
    return _fit_into_page(buffer.getvalue(), name, description)


def _fit_into_page(svg: str, name: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # Its rule would hold for the whole page; the page's style sheet has it for figures.
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    # Tags alone: what stands between them is text, whose < and > matplotlib escapes.
    svg = re.sub(r"<[a-z][^>]*>", lambda tag: _fit_tag(tag[0], name, referred), svg)
    opening = re.search(r'<svg [^>]*width="([\d.]+)pt"[^>]*viewBox="([^"]*)"[^>]*>', svg)
    width_px = round(float(opening[1]) * 4 / 3)
    # An image's parts cannot be reached one by one, and cells have to be.
    role = "group" if f' id="{cell_id(name, 0)}"' in svg else "img"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{opening[2]}" width="{width_px}" style="min-width: {width_px * 5 // 8}px" '
        f'role="{role}" '
        f"aria-label={quoteattr(description)}>{svg[opening.end() :]}"
    )
    return re.sub(r"\s*\n\s*", " ", svg).strip()


def _fit_tag(tag: str, name: str, referred: set[str]) -> str:
    """House colours as variables, the page's font, and ids of this figure's own."""
    tag = re.sub(r" font-family: [^;\"]*;?", "", tag)
    tag = re.sub(r"(\.\d\d)\d+", r"\1", tag)  # a hundredth of a point cannot be seen
    tag = re.sub(r" transform=\"rotate\(-0 [^)]*\)\"", "", tag)
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(colour, f"var(--{variable}, {colour})")
    identity = re.search(r' id="([^"]*)"', tag)
    if identity and identity[1] in referred:
        tag = tag.replace(identity[0], f' id="{name}-{identity[1]}"')
    elif identity and not identity[1].startswith(f"cell-{name}-"):
        tag = tag.replace(identity[0], "")
    return re.sub(r'(href="#|url\(#)([^")]+)', rf"\g<1>{name}-\2", tag)
