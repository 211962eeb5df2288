"""The figures of an evaluation: metrics with intervals, the map, lengths and nearest real texts."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..evaluate import TRAINING_SET, Evaluation, Metric, SetEvaluation
from .figure import INK, MUTED, SERIES, WIDTH, Cell, Figure, cell_id, house_style, to_svg
from .table import DIRECTIONS, metric_rows

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
NUM_BINS = 24
NUM_SHOWN_PER_CELL = 6
MAX_LABEL_LEN = 22
MAX_TITLE_LEN = 28  # of one line over half a figure
MAX_POINTS = 1000
MAX_PANELS = 6  # so that figures are of about one height


def evaluation_figures(evaluation: Evaluation) -> list[Figure]:
    """All figures that the evaluation has data for, in the report's order."""
    figures = [
        interval_figure(evaluation, group, first, [row.metric for row in rows[first:][:MAX_PANELS]])
        for group, rows in metric_rows(evaluation).items()
        for first in range(0, len(rows), MAX_PANELS)
    ]
    if any(one_set.points for one_set in evaluation.sets):
        figures.append(map_figure(evaluation))
    texts = {s.name: s.texts for s in evaluation.sets if s.name != TRAINING_SET}
    figures.append(length_figure(texts, evaluation.real.texts))
    if any(one_set.nearest_real for one_set in evaluation.sets):
        figures.append(similarity_figure(evaluation))
    return figures


def set_colour(number: int, name: str) -> str:
    """A set's colour everywhere in the report; number: its place among the sets, from 0."""
    return MUTED if name == TRAINING_SET else SERIES[number % len(SERIES)]


def interval_figure(
    evaluation: Evaluation, group: str, first: int, metrics: Sequence[Metric]
) -> Figure:
    """Dots and whiskers: one panel for each metric, one line for each set.

    first: the place of the first metric in its group.
    """
    from matplotlib.figure import Figure as Drawing

    num_rows = math.ceil(len(metrics) / 2)
    titles = [_wrapped(f"{m.title}\u00a0{DIRECTIONS[m.better][0]}") for m in metrics]
    num_lines = sum(
        1 + max(title.count("\n") for title in titles[left : left + 2])
        for left in range(0, len(titles), 2)
    )
    height = num_rows * (0.48 + 0.2 * len(evaluation.sets)) + 0.16 * num_lines
    with house_style():
        drawing = Drawing(figsize=(WIDTH, height), layout="constrained")
        panels = list(drawing.subplots(num_rows, 2, squeeze=False, sharey=True).flat)
        for panel, metric, title in zip(panels, metrics, titles, strict=False):
            _draw_intervals(panel, metric, evaluation)
            panel.set_title(title)
        for panel in panels[len(metrics) :]:
            panel.remove()
        for panel in panels[::2]:
            panel.set_yticks(
                range(len(evaluation.sets)), [_shortened(s.name) for s in evaluation.sets]
            )
        panels[0].set_ylim(len(evaluation.sets) - 0.4, -0.6)
        name = f"intervals-{'-'.join(group.split())}-{first}"
        svg = to_svg(drawing, name, f"{group}: every metric's value and interval for each set")
    title = group[:1].upper() + group[1:]
    return Figure(name, f"{title}, continued" if first else title, "", svg)


def _draw_intervals(panel, metric: Metric, evaluation: Evaluation) -> None:
    for number, one_set in enumerate(evaluation.sets):
        estimate = one_set.estimates.get(metric.name)
        if estimate is None or not math.isfinite(estimate.value):
            continue
        colour = set_colour(number, one_set.name)
        if estimate.low is not None and estimate.high is not None:
            panel.plot([estimate.low, estimate.high], [number, number], color=colour, linewidth=1.4)
        marker = MARKERS[number % len(MARKERS)]
        panel.plot([estimate.value], [number], marker, color=colour, markersize=5)
    real = evaluation.real.estimates.get(metric.name)
    if real is not None and math.isfinite(real.value):
        panel.axvline(real.value, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.locator_params(axis="x", nbins=4)
    panel.margins(x=0.08)
    low, high = panel.dataLim.intervalx
    if high - low < 1e-9:  # nothing but rounding
        panel.set_xlim(low - 0.1, high + 0.1)


def map_figure(evaluation: Evaluation) -> Figure:
    """Every set over the real texts on the common map, with convex hulls (the paper's Figure 7)."""
    from matplotlib.figure import Figure as Drawing

    sets = enumerate(evaluation.sets)
    drawn = [(n, s) for n, s in sets if s.points and s.name != TRAINING_SET]
    num_columns = 1 if len(drawn) == 1 else 2
    num_rows = math.ceil(len(drawn) / num_columns)
    panel_height = 3.6 if num_columns == 1 else 2.35
    with house_style():
        drawing = Drawing(figsize=(WIDTH, num_rows * panel_height), layout="constrained")
        panels = drawing.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
        for panel in panels.flat:
            panel.set_axis_off()
        for panel, (number, one_set) in zip(panels.flat, drawn, strict=False):
            _draw_points(panel, evaluation.real, MUTED, 2.0, "dashed")
            colour = set_colour(number, one_set.name)
            _draw_points(panel, one_set, colour, 3.0, "solid")
            panel.set_title(_shortened(one_set.name), color=colour)
        svg = to_svg(drawing, "map", "Each set's texts over the real ones on a map, with hulls")
    num_points = min(MAX_POINTS, evaluation.sample_size)
    caption = (
        f"Embeddings in two dimensions (UMAP), {num_points:,} texts of each. Coloured: the set. "
        "Grey: the real texts. Lines: convex hulls. A hull that leaves the dashed one holds texts "
        "unlike any real one; grey points outside a coloured hull are what the set does not cover."
    )
    return Figure("map", "Where the texts lie", caption, svg)


def _draw_points(panel, one_set: SetEvaluation, colour: str, size: float, line: str) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if not one_set.points:
        return
    # One path of strokes without length, whose round ends are the dots: a tenth of the bytes that
    # one element for each point takes.
    points = np.asarray(one_set.points[:MAX_POINTS], dtype=float)
    vertices = np.repeat(points, 2, axis=0)
    path = Path(vertices, [Path.MOVETO, Path.LINETO] * len(points))
    path.should_simplify = False
    panel.add_patch(
        PathPatch(path, edgecolor=colour, fill=False, linewidth=size, capstyle="round", alpha=0.75)
    )
    panel.update_datalim(points)
    if one_set.hull:
        corners = np.asarray([*one_set.hull, one_set.hull[0]], dtype=float)
        panel.plot(*corners.T, color=colour, linewidth=1.1, linestyle=line)
    panel.autoscale_view()


class _HistogramRow(NamedTuple):
    """A set's numbers, one for each text, and what a bar's cell shows for each."""

    name: str
    colour: str
    values: Sequence[float]
    shown: Sequence[str]


def length_figure(sets: dict[str, Sequence[str]], real: Sequence[str]) -> Figure:
    """Words per text, each set before the outline of the real texts ([]: none)."""
    rows = [
        _HistogramRow(name, set_colour(number, name), [_num_words(t) for t in texts], texts)
        for number, (name, texts) in enumerate(sets.items())
    ]
    real_lengths = [_num_words(text) for text in real]
    lengths = [length for row in rows for length in row.values] + real_lengths
    shortest, longest = min(lengths), max(lengths)
    step = math.ceil((longest - shortest + 1) / NUM_BINS)
    edges = np.arange(shortest, longest + step + 1, step) - 0.5
    outline = " The line is the real texts." if real else ""
    return _histograms(
        "lengths",
        "How long they are",
        f"Words per text, in shares of each set.{outline} A bar opens texts of that length.",
        "words per text",
        rows,
        edges,
        real_lengths,
        lambda low, high: _words_between(math.ceil(low), math.floor(high)),
    )


def similarity_figure(evaluation: Evaluation) -> Figure:
    """How near the nearest real text is to each synthetic one."""
    rows = [
        _HistogramRow(
            one_set.name,
            set_colour(number, one_set.name),
            [nearest.similarity for nearest in one_set.nearest_real],
            [
                f"{text}\nnearest real text ({nearest.similarity:.2f}): {nearest.text}"
                for text, nearest in zip(one_set.texts, one_set.nearest_real, strict=True)
            ],
        )
        for number, one_set in enumerate(evaluation.sets)
        if one_set.nearest_real
    ]
    real = [nearest.similarity for nearest in evaluation.real.nearest_real]
    outline = " The line is real texts and the nearest other one." if real else ""
    lowest = min([*real, *(value for row in rows for value in row.values)])
    first = math.floor(max(-1.0, min(lowest, 0.95)) * 20) / 20
    # Whole steps of 1/20, the last bar ending at 1 and holding it.
    edges = np.linspace(first, 1.0, round((1.0 - first) * 20) + 1)
    return _histograms(
        "similarity",
        "How near the nearest real text is",
        "Cosine of a text's embedding and the nearest real text's, among those that the metrics "
        f"look at, in shares of each set.{outline} Mass at 1 is copying; mass far to the left is "
        "off the subject. A bar opens its pairs.",
        "similarity to the nearest real text",
        rows,
        edges,
        real,
        lambda low, high: f"similarity {low:.2f} to {high:.2f}",
    )


def _histograms(name, title, caption, axis_label, rows, edges, real_values, describe) -> Figure:
    """One row of bars for each set on a common axis; each bar a cell that opens its texts."""
    from matplotlib.figure import Figure as Drawing

    cells: list[Cell] = []
    with house_style():
        height = 0.45 + 0.95 * len(rows)
        drawing = Drawing(figsize=(WIDTH, height), layout="constrained")
        panels = drawing.subplots(len(rows), 1, squeeze=False, sharex=True, sharey=True).flat
        for panel, row in zip(panels, rows, strict=True):
            places = np.clip(np.digitize(row.values, edges) - 1, 0, len(edges) - 2)
            for place in np.unique(places):
                members = np.flatnonzero(places == place)
                low, high = edges[place], edges[place + 1]
                bars = panel.bar(
                    low, 100 * len(members) / len(row.values), high - low, align="edge",
                    color=row.colour, edgecolor="none", linewidth=0, alpha=0.8,
                )  # fmt: skip
                bars[0].set_gid(cell_id(name, len(cells)))
                label = f"{row.name}, {describe(low, high)}: {len(members)} of {len(row.values)}"
                cells.append(Cell(label, [row.shown[i] for i in members[:NUM_SHOWN_PER_CELL]]))
            if len(real_values):
                weights = np.full(len(real_values), 100 / len(real_values))
                shares, _ = np.histogram(real_values, edges, weights=weights)
                panel.stairs(shares, edges, color=INK, linewidth=1.0)
            panel.set_title(_shortened(row.name), color=row.colour, pad=2)
            panel.yaxis.set_major_formatter(lambda share, _: f"{share:g} %")
            panel.locator_params(axis="y", nbins=3)
        panel.set_xlabel(axis_label)
        panel.locator_params(axis="x", integer=edges[1] - edges[0] >= 1)
        svg = to_svg(drawing, name, f"{title}: one histogram for each set")
    return Figure(name, title, caption, svg, cells)


def _num_words(text: str) -> int:
    return len(text.split())


def _words_between(low: int, high: int) -> str:
    return f"{low} words" if low == high else f"{low} to {high} words"


def _wrapped(title: str) -> str:
    return textwrap.fill(title, MAX_TITLE_LEN, break_on_hyphens=False)


def _shortened(name: str) -> str:
    return name if len(name) <= MAX_LABEL_LEN else name[: MAX_LABEL_LEN - 1] + "…"
