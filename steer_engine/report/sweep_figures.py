"""The figures of a sweep: heat maps over gamma and eta, curves along one parameter, the trade-off.

They follow Figures 3 to 5 of O'Neill et al. 2023. A cell of each opens texts of its data set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluate import Estimate
from ..files import write_atomically
from ..sweep import AXES
from ..sweep_results import CellScore, Comparison
from .figure import MUTED, SERIES, WIDTH, Cell, Figure, cell_id, house_style, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

NUM_SAMPLES = 6
# Of even lightness steps, and told apart by people with any common colour vision.
COLOUR_MAP = "cividis"
FRONT, OTHERS = SERIES[1], SERIES[0]
Measure = Callable[[CellScore], float]
AXIS_TITLES = {"gamma": "gamma", "eta": "eta", "num_negatives": "number of negatives"}


def sweep_figures(comparison: Comparison) -> list[Figure]:
    """All figures that the grid has room for.

    Heat maps where gamma and eta both have several values, a curve for each parameter that has, and
    the trade-off always.
    """
    with house_style():
        figures = _heat_maps(comparison)
        figures += [_curve(comparison, axis) for axis in AXES if len(_values(comparison, axis)) > 1]
        figures.append(_trade_off(comparison))
    return figures


def write_figures(figures: Sequence[Figure], directory: str | Path) -> list[Path]:
    """Each figure as directory/NAME.svg, a file of its own."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures:
        paths.append(directory / f"{figure.name}.svg")
        # Inside a page the font is the page's.
        standalone = figure.svg.replace("<svg ", '<svg font-family="sans-serif" ', 1)
        write_atomically(paths[-1], standalone + "\n")
    return paths


def _cell(score: CellScore, comparison: Comparison) -> Cell:
    measures = (
        f"{comparison.diversity.title} {score.diversity.value:.3f}",
        f"{comparison.likeness.title} {score.likeness.value:.3f}",
    )
    return Cell(f"{score.cell.label}: {', '.join(measures)}", score.texts[:NUM_SAMPLES])


def _values(comparison: Comparison, axis: str) -> list[float | int | str]:
    """The values of a parameter, ascending, "max" last; without None."""
    values = {getattr(score.cell, axis) for score in comparison.scores} - {None}
    return sorted(values, key=lambda v: (isinstance(v, str), v))


def _intervals(*estimates: Estimate) -> str:
    kinds = sorted({e.interval for e in estimates if e.interval})
    return f" Bars: {'; '.join(kinds)}." if kinds else ""


def _capital(title: str) -> str:
    """With a capital first letter; the others stay (MAUVE)."""
    return title[:1].upper() + title[1:]


def _heat_maps(comparison: Comparison) -> list[Figure]:
    if min(len(_values(comparison, axis)) for axis in ("gamma", "eta")) < 2:
        return []
    both = f"{comparison.diversity.title} + {comparison.likeness.title}"
    return [
        _heat_map(comparison, "diversity", comparison.diversity.title, lambda s: s.diversity.value),
        _heat_map(comparison, "likeness", comparison.likeness.title, lambda s: s.likeness.value),
        _heat_map(comparison, "sum", both, lambda s: s.sum),
    ]


def _heat_map(comparison: Comparison, what: str, title: str, measure: Measure) -> Figure:
    """One panel for each number of negatives, under one colour scale."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure as Drawing

    name = f"sweep-{what}"
    counts = _values(comparison, "num_negatives") or [None]
    num_rows = len(_values(comparison, "eta"))
    drawing = Drawing(
        figsize=(WIDTH, (0.7 + max(1.2, 0.42 * num_rows)) * len(counts)), layout="constrained"
    )
    all_axes = drawing.subplots(len(counts), 1, squeeze=False)[:, 0]
    values = [measure(score) for score in comparison.scores]
    scale = ScalarMappable(Normalize(min(values), max(values)), COLOUR_MAP)
    cells: list[Cell] = []
    for axes, count in zip(all_axes, counts, strict=True):
        panel = [s for s in comparison.scores if s.cell.num_negatives == count]
        _fill_panel(axes, panel, comparison, measure, scale, name, first_cell=len(cells))
        cells += [_cell(score, comparison) for score in panel]
        if len(counts) > 1:
            axes.set_title(f"number of negatives: {count}")
    drawing.colorbar(scale, ax=list(all_axes), label=title).outline.set_visible(False)
    caption = (
        f"{_capital(title)} of every cell; the frame marks the largest sum of "
        f"{comparison.diversity.title} and {comparison.likeness.title}."
    )
    return Figure(name, _capital(title), caption, to_svg(drawing, name, caption), cells)


def _fill_panel(
    axes: Axes,
    panel: Sequence[CellScore],
    comparison: Comparison,
    measure: Measure,
    scale: ScalarMappable,
    name: str,
    first_cell: int,
) -> None:
    from matplotlib.patches import Rectangle

    gammas, etas = _values(comparison, "gamma"), _values(comparison, "eta")
    for index, score in enumerate(panel, start=first_cell):
        column, row = gammas.index(score.cell.gamma), etas.index(score.cell.eta)
        value = measure(score)
        colour = scale.to_rgba(value)
        patch = Rectangle(
            (column - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor=colour, linewidth=0.5
        )
        patch.set_gid(cell_id(name, index))
        axes.add_patch(patch)
        # On a colour map's own colour the text keeps one colour in light and dark.
        red, green, blue, _ = colour
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        text_colour = "#ffffff" if is_dark else "#000000"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=text_colour)
        if score is comparison.best:
            frame = Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False)
            frame.set(edgecolor=text_colour, linewidth=2)
            axes.add_patch(frame)
    axes.set_xticks(range(len(gammas)), [f"{v:g}" for v in gammas])
    axes.set_yticks(range(len(etas)), [f"{v:g}" for v in etas])
    axes.set(xlim=(-0.5, len(gammas) - 0.5), ylim=(-0.5, len(etas) - 0.5))
    axes.set(xlabel="gamma", ylabel="eta")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _curve(comparison: Comparison, axis: str) -> Figure:
    """Both measures along one parameter, the others as in the best cell."""
    from matplotlib.figure import Figure as Drawing

    best = comparison.best
    others = [name for name in AXES if name != axis]
    order = _values(comparison, axis)
    line = [
        score
        for score in comparison.scores
        if all(getattr(score.cell, name) == getattr(best.cell, name) for name in others)
    ]
    line.sort(key=lambda score: order.index(getattr(score.cell, axis)))
    places = [getattr(score.cell, axis) for score in line]
    # "max" is no number, so the values then stand side by side.
    is_number = not any(isinstance(value, str) for value in places)
    x = places if is_number else list(range(len(places)))

    name = f"sweep-{axis.replace('_', '-')}"
    drawing = Drawing(figsize=(WIDTH, 3.2), layout="constrained")
    axes = drawing.subplots()
    series = (
        (comparison.diversity.title, [s.diversity for s in line], SERIES[0], "o"),
        (comparison.likeness.title, [s.likeness for s in line], SERIES[1], "s"),
    )
    cells: list[Cell] = []
    for title, estimates, colour, marker in series:
        _draw_series(axes, x, estimates, colour, marker, title, name, len(cells))
        cells += [_cell(score, comparison) for score in line]
    best_x = x[line.index(best)]
    axes.axvline(best_x, color=MUTED, linestyle=":", zorder=0)
    axes.annotate(
        f"best sum {best.sum:.2f}", (best_x, 1.02), xycoords=("data", "axes fraction"), ha="center"
    )
    axes.set_xlabel(AXIS_TITLES[axis])
    axes.set_xticks(x, [f"{v:g}" if is_number else str(v) for v in places])
    axes.grid(axis="y")
    axes.legend(loc="best")
    fixed = [
        f"{AXIS_TITLES[n]} {getattr(best.cell, n)}"
        for n in others
        if getattr(best.cell, n) is not None
    ]
    where = f" at {', '.join(fixed)}" if fixed else ""
    caption = (
        f"{_capital(comparison.diversity.title)} and {comparison.likeness.title} along "
        f"{AXIS_TITLES[axis]}{where}; the dotted line marks the largest sum of both."
        f"{_intervals(*(e for _, estimates, *_ in series for e in estimates))}"
    )
    title = f"Along {AXIS_TITLES[axis]}"
    return Figure(name, title, caption, to_svg(drawing, name, caption), cells)


def _draw_series(
    axes: Axes,
    x: Sequence[float],
    estimates: Sequence[Estimate],
    colour: str,
    marker: str,
    title: str,
    name: str,
    first_cell: int,
) -> None:
    """A line with error bars; every marker is an element of its own, which opens its cell."""
    y = [e.value for e in estimates]
    axes.errorbar(x, y, yerr=_bars(estimates), color=colour, capsize=3, linewidth=1.2)
    for index, point in enumerate(zip(x, y, strict=True)):
        (dot,) = axes.plot(*point, color=colour, marker=marker, markersize=7, linestyle="none")
        dot.set_gid(cell_id(name, first_cell + index))
        if index == 0:
            dot.set_label(title)


def _bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Lengths below and above the values; 0 where there is no interval."""
    below = [0.0 if e.low is None else max(0.0, e.value - e.low) for e in estimates]
    above = [0.0 if e.high is None else max(0.0, e.high - e.value) for e in estimates]
    return [below, above]


def _trade_off(comparison: Comparison) -> Figure:
    from matplotlib.figure import Figure as Drawing

    name = "sweep-trade-off"
    front = comparison.front
    drawing = Drawing(figsize=(WIDTH, 3.8), layout="constrained")
    axes = drawing.subplots()
    for index, score in enumerate(comparison.scores):
        is_front = any(score is other for other in front)
        _draw_point(axes, score, is_front, score is comparison.best, cell_id(name, index))
    axes.errorbar(
        [s.diversity.value for s in front],
        [s.likeness.value for s in front],
        xerr=_bars([s.diversity for s in front]),
        yerr=_bars([s.likeness for s in front]),
        color=FRONT,
        linewidth=1.2,
        elinewidth=0.6,
    )
    for number, score in enumerate(front, start=1):
        point = (score.diversity.value, score.likeness.value)
        axes.annotate(str(number), point, xytext=(7, 5), textcoords="offset points")
    axes.set(xlabel=comparison.diversity.title, ylabel=comparison.likeness.title)
    axes.grid()
    listed = "; ".join(f"{number}: {s.cell.label}" for number, s in enumerate(front, start=1))
    caption = (
        "Every cell of the sweep. The line is the Pareto front, the cells that no other beats in "
        f"both measures ({listed}); the star is the largest sum of both."
        f"{_intervals(*(e for s in front for e in (s.diversity, s.likeness)))}"
    )
    title = f"{_capital(comparison.likeness.title)} against {comparison.diversity.title}"
    cells = [_cell(score, comparison) for score in comparison.scores]
    return Figure(name, title, caption, to_svg(drawing, name, caption), cells)


def _draw_point(axes: Axes, score: CellScore, is_front: bool, is_best: bool, gid: str) -> None:
    colour = FRONT if is_front else OTHERS
    (dot,) = axes.plot(
        score.diversity.value,
        score.likeness.value,
        color=colour,
        marker="*" if is_best else "s" if is_front else "o",
        markersize=13 if is_best else 7,
        markerfacecolor=colour if is_front else "none",
        linestyle="none",
        zorder=3,
    )
    dot.set_gid(gid)
