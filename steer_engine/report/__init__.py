"""Reports: a run, its evaluation and its figures as one self-contained HTML page."""

from .figure import Cell, Figure, cell_id, house_style, to_svg

__all__ = ["Cell", "Figure", "cell_id", "house_style", "to_svg"]
